"""Several methods at once, and weights that follow a schedule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from training_tools import images, network, plain

import kdkernels
from kdkernels.mixing import mixup
from kdkernels.training import Distillation, fit, make_method
from kdkernels.training.triplets import triplet_labels


def test_a_mixture_is_the_sum_with_cross_entropy_once() -> None:
    teacher, student, (x, y) = network(6, 7, 8), network(), images()
    module = Distillation(teacher, student, ["kd", ("sp", {"weight": 300}), ("amd", {"weight": 0.1})]).eval()
    result = module(x, y)
    with torch.no_grad():
        z_s, z_t = student(x), teacher(x)
        stages_s, stages_t = ([m.stages[: i + 1](x) for i in range(3)] for m in (student, teacher))
        expected = {
            "ce": 0.1 * F.cross_entropy(z_s, y),
            "kd": 0.9 * kdkernels.kd_loss(z_s, z_t),
            "sp": 300 * kdkernels.sp_loss(stages_s[-1], stages_t[-1]),  # of the last stage
            "amd": 0.1 * kdkernels.amd_loss(stages_s, stages_t, layer_weights="area"),  # of all
        }
    torch.testing.assert_close(result.terms, expected)
    torch.testing.assert_close(result.loss.detach(), sum(expected.values()))
    # the first that has a term decides on it
    terms = Distillation(teacher, student, "sp+kd").eval()(x, y).terms
    torch.testing.assert_close(terms["ce"], F.cross_entropy(z_s, y))


def test_named_layers_are_for_all_methods_of_a_mixture() -> None:
    teacher, student, (x, y) = network(6, 7, 8), network(), images()
    terms = Distillation(teacher, student, "sp+amd", layers=["stages.0", "stages.1"]).eval()(x, y).terms
    alone = Distillation(teacher, student, "sp", layers=["stages.0", "stages.1"]).eval()(x, y).terms
    torch.testing.assert_close(terms["sp"], alone["sp"])


def test_mixed_images_keep_their_own_labels() -> None:
    teacher, student, (x, y) = network(6, 7, 8), network().eval(), images()
    module = Distillation(teacher, student, "kd+stkd")
    module.training = True  # so that images are mixed, and the networks run as below
    torch.manual_seed(1)
    terms = module(x, y).terms
    torch.manual_seed(1)
    stkd = Distillation(teacher, student, "stkd")
    assert terms.keys() == {"stkd"}, "cross entropy and KD are inside it"
    torch.testing.assert_close(terms, stkd(x, y).terms)
    torch.manual_seed(1)
    module = Distillation(teacher, student, ["sp", ("alone", {"alpha": 1.0})])
    terms = module(x, y).terms
    torch.manual_seed(1)
    mixed, first, second, lam = mixup(x, y, alpha=1.0)
    z = student(mixed)
    ce = lam * F.cross_entropy(z, first) + (1 - lam) * F.cross_entropy(z, second)
    torch.testing.assert_close(terms["ce"], ce.detach())
    sp = kdkernels.sp_loss(student.stages(mixed), teacher.stages(mixed))
    torch.testing.assert_close(terms["sp"], 3000 * sp.detach())


def test_the_others_see_the_upright_views_of_mlkd_and_all_images_of_triplets() -> None:
    teacher, student, (x, y) = network(6, 7, 8).eval(), network().eval(), images()
    module = Distillation(teacher, student, "kd+mlkd", example=x)
    module.training = True
    result = module(x, y)
    assert result.terms.keys() == {"ce", "mlkd", "kd"}
    torch.testing.assert_close(result.terms["kd"], 0.9 * kdkernels.kd_loss(student(x), teacher(x)).detach())
    module = Distillation(teacher, student, "corsd+kd", example=x)
    module.training = True
    result = module(x, y[:2], y[1:3])
    assert result.terms.keys() == {"ce", "corsd", "kd"}
    torch.testing.assert_close(result.terms["kd"], 0.9 * kdkernels.kd_loss(student(x), teacher(x)).detach())
    torch.testing.assert_close(result.terms["ce"], F.cross_entropy(student(x), triplet_labels(y[:2], y[1:3])).detach())


def test_mixtures_train_with_their_heads_and_as_one_batch() -> None:
    module = make_mixed()
    heads = [p.detach().clone() for p in module.method.parameters()]
    x, y = images(32)
    fit(module, DataLoader(TensorDataset(x.cpu(), y.cpu()), 16), epochs=1, lr=0.01, progress=False)
    assert heads
    assert all(not torch.equal(a, b.cpu()) for a, b in zip(heads, module.method.parameters(), strict=True))
    weights = []
    for accumulate, batch in ((1, 32), (2, 16)):
        torch.manual_seed(0)
        module = Distillation(plain(8, 1).float(), plain(6, 2).float(), ["kd", ("sp", {"weight": 10.0})])
        fit(module, DataLoader(TensorDataset(x.cpu(), y.cpu()), batch), epochs=3, accumulate=accumulate, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in module.student.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def make_mixed() -> Distillation:
    torch.manual_seed(0)
    return Distillation(network(6, 7, 8), network(), "mlkd+sp+kd")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("kd+nothing", "must be one of .*, got 'nothing'"),
        ("stkd+mlkd", "only one method of a mixture may change the batch, got STKD and MLKD"),
        ("kd+kd", r"a method is given twice: \['KD', 'KD'\]"),
        ([], "at least one method"),
        (["kd", ("sp", {"weight": -1})], "SP: weight must be zero or positive"),
    ],
)
def test_bad_mixtures_are_refused(parts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(parts)


def test_options_of_a_mixture_go_beside_their_method() -> None:
    with pytest.raises(ValueError, match="beside their method"):
        make_method("kd+sp", weight=3)
    assert make_method(make_method("kd")).weight == 0.9


def test_weights_follow_their_schedule() -> None:
    seen: list[float] = []

    def schedule(share: float) -> float:
        seen.append(share)
        return 100 * share

    module = Distillation(network(6, 7, 8), network(), ["kd", ("sp", {"weight": schedule})])
    sp = module.method.methods[1]
    assert sp.weight == 0
    seen.clear()
    x, y = images(12)
    history = fit(module, DataLoader(TensorDataset(x.cpu(), y.cpu()), 6), epochs=2, lr=1e-9, progress=False)
    assert seen == [0, 0.25, 0.5, 0.75]
    assert sp.grown == 1
    assert sp.weight == 75
    assert history[0]["sp"] * 5 == pytest.approx(history[1]["sp"], rel=0.01)  # 0 and 25, then 50 and 75
    with pytest.raises(ValueError, match=r"KD: weight must be in \[0, 1\], got 1.5"):
        make_method("kd", weight=lambda share: 1.5 * share)
    mlkd = make_method("mlkd", supervised_weight=lambda share: share)
    Distillation(network(), network(), mlkd)
    with pytest.raises(ValueError, match="let its schedule begin above 0"):
        mlkd.schedule(0.5)
    mlkd = make_method("mlkd", alignment_weight=lambda share: share)
    Distillation(network(), network(), mlkd).schedule(0.5)
    assert mlkd.loss.options["alignment_weight"] == 0.5


@pytest.mark.parametrize("name", ["mlkd", "sp", "at", "nst", "ickd", "rkd"])
def test_a_term_warms_up(name: str) -> None:
    x, y = images(6)
    loader = DataLoader(TensorDataset(x.cpu().repeat(2, 1, 1, 1), y.cpu().repeat(2)), 6)  # one batch twice
    runs = {}
    for warmup in (0.4, 0.0):
        torch.manual_seed(0)
        method = make_method(name, warmup=warmup)
        module = Distillation(network(6, 7, 8), network(), [method, "kd"])
        whole = module(x, y).terms[name]
        assert method.grown == 1  # nobody has said that a training begins
        assert whole > 0
        runs[warmup] = [row[name] for row in fit(module, loader, epochs=5, lr=1e-9, progress=False)]
        assert method.grown == 1
    grown = [now / whole for now, whole in zip(runs[0.4], runs[0.0], strict=True)]
    assert grown == pytest.approx([0.125, 0.625, 1, 1, 1], rel=1e-3)  # of 10 steps at 0, 1/4, 2/4, 3/4, 1
    with pytest.raises(ValueError, match=r"warmup must be in \[0, 1\], got 2"):
        make_method(name, warmup=2)


def test_the_option_behind_a_term_of_a_mixture() -> None:
    method = make_method("kd+sp+mlkd")
    assert method.scaled_by("sp") == "weight= of SP"
    assert method.scaled_by("mlkd") == "correlation_weight, supervised_weight, alignment_weight= of MLKD"
