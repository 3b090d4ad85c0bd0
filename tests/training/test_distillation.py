"""A teacher, a student and a method as one module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_tools import hooks, images, network

import kdkernels
from kdkernels.training import (
    Batch,
    Distillation,
    Method,
    Outputs,
    make_method,
)
from kdkernels.training.evaluation import evaluate
from kdkernels.training.methods import METHODS, MLLD

METHODS_OF_TERMS = ["alone", "kd", "sp", "stkd", "amd", "at", "nst", "rkd", "pkt", "cc", "irg", "nkd", "dist", "mlld"]


@pytest.mark.parametrize("method", METHODS_OF_TERMS)
def test_distillation_is_the_sum_of_the_methods_terms(method: str) -> None:
    teacher, student, (x, y) = network(6, 7, 8).eval(), network(), images()
    module = Distillation(None if method == "alone" else teacher, student, method).eval()  # eval: nothing is mixed
    result = module(x, y)
    with torch.no_grad():
        z_s, z_t, f_s, f_t = student(x), teacher(x), student.stages(x), teacher.stages(x)
        ce = F.cross_entropy(z_s, y)
        kd = kdkernels.kd_loss(z_s, z_t)
        p_s, p_t = (f.mean((2, 3)) for f in (f_s, f_t))
        stages_s, stages_t = ([m.stages[: i + 1](x) for i in range(3)] for m in (student, teacher))
        expected = {
            "alone": ce,
            "kd": 0.1 * ce + 0.9 * kd,
            "sp": ce + 3000 * kdkernels.sp_loss(f_s, f_t),
            "stkd": 0.1 * ce + 0.9 * kd,
            "rkd": ce + kdkernels.rkd_loss(p_s, p_t),
            "pkt": ce + 30000 * kdkernels.pkt_loss(p_s, p_t),
            "cc": ce + 100 * kdkernels.cc_loss(p_s, p_t),
            "irg": ce + 5 * kdkernels.irg_loss(p_s, p_t),
            "nkd": ce + kdkernels.nkd_loss(z_s, z_t, y),
            "dist": ce + 2 * kdkernels.dist_loss(z_s, z_t),
            "mlld": 0.1 * ce + 0.9 * kdkernels.mlld_loss(z_s, z_t),
            "at": ce + 10 * kdkernels.at_loss(stages_s, stages_t),
            "nst": ce + kdkernels.nst_loss(stages_s, stages_t),
            "amd": 0.1 * ce + 0.9 * kd + 0.2 * kdkernels.amd_loss(stages_s, stages_t, layer_weights="area"),
        }[method]
    torch.testing.assert_close(result.loss.detach(), expected)
    torch.testing.assert_close(sum(result.terms.values()), expected)
    torch.testing.assert_close(result.logits, z_s)
    result.loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    module.close()
    assert hooks(student) == hooks(teacher) == 0


def test_mlld_sees_the_images_and_strong_ones() -> None:
    teacher, student, (x, y) = network(6, 7, 8), network().eval(), images()
    module = Distillation(teacher, student, MLLD(strong=lambda images: images.flip(3)))
    student.eval()  # its batch norm, so that the two views can be had one by one
    result = module(x, y)
    pairs = [(student(view), teacher(view)) for view in (x, x.flip(3))]
    ce = sum(F.cross_entropy(s, y) for s, _ in pairs)
    torch.testing.assert_close(result.loss, 0.1 * ce + 0.9 * kdkernels.mlld_loss(*pairs[0], *pairs[1]))
    assert len(module.eval()(x, y).logits) == len(y)


def test_ickd_projects_the_student() -> None:
    teacher, student, (x, y) = network(6, 7, 8), network(), images()
    module = Distillation(teacher, student, "ickd").eval()
    result = module(x, y)
    with torch.no_grad():
        features = module.method.projection(student.stages(x)), teacher.stages(x)
        expected = F.cross_entropy(student(x), y) + 2.5 * kdkernels.ickd_loss(*features)
    torch.testing.assert_close(result.loss.detach(), expected)
    result.loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    assert len(list(module.parameters())) == len(list(student.parameters())) + 3
    module.close()


def test_the_teacher_stays_out_of_the_way() -> None:
    teacher, student = network(6, 7, 8), network()
    module = Distillation(teacher, student, "kd")
    module.train()
    assert student.training
    assert not teacher.training
    assert set(module.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    assert len(list(module.parameters())) == len(list(student.parameters()))
    before = teacher.stages[0][1].running_mean.clone()
    module(*images())
    assert torch.equal(teacher.stages[0][1].running_mean, before)
    module.double()
    assert teacher.fc.weight.dtype == torch.float64


def test_stkd_trains_on_mixed_images_and_both_networks_see_them() -> None:
    seen: list[Tensor] = []
    teacher, student = network(6, 7, 8), network()
    for model in (teacher, student):
        model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, y = images()
    Distillation(teacher, student, "stkd").train()(x, y)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], x)


def test_layers_can_be_named() -> None:
    teacher, student, (x, y) = network(6, 7, 8), network(), images()
    module = Distillation(teacher, student, "sp", layers=["stages.0"], teacher_layers=["stages.1"]).eval()
    expected = 3000 * kdkernels.sp_loss(student.stages[:1](x), teacher.stages[:2](x))
    torch.testing.assert_close(module(x, y).terms["sp"], expected.detach())
    with pytest.raises(ValueError, match="as many teacher as student layers"):
        Distillation(teacher, student, "sp", layers=["stages.0"], teacher_layers=["stages.0", "stages.1"])


def test_one_layer_can_be_named_by_a_string() -> None:
    module = Distillation(network(6, 7, 8), network(), "sp", layers="stages.1")
    assert module._student_taps.names == module._teacher_taps.names == ["stages.1"]


def test_a_distillation_that_fails_leaves_no_hooks() -> None:
    teacher, student = network(6, 7, 8), network()
    with pytest.raises(ValueError, match="no modules"):
        Distillation(teacher, student, "sp", layers=["stages.2"], teacher_layers=["nope"])
    with pytest.raises(ValueError, match="cannot be read off"):
        Distillation(teacher, student, "mlkd", layers=["stages.2.2"])
    with pytest.raises(ValueError, match="as many teacher as student"):
        Distillation(teacher, student, "sp", teacher_layers=[])
    with pytest.raises(ValueError, match="same module"):
        Distillation(torch.compile(student), student, "kd")
    assert hooks(student) == hooks(teacher) == 0


class HeadFirst(nn.Module):
    """Its last layer is not registered last, and its stage returns more channels than its last layer."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.conv(x)], 1)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.layer1, self.layer2, self.layer3 = self.Dense(), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def test_logits_width_read_wrongly_is_told() -> None:
    x, y = images()
    layers = ["layer2", "layer3"]
    with pytest.raises(ValueError, match=r"\(\[8, 8, 8\], \[\]\), but they are \(\[8, 8, 4\], \[\]\).*example="):
        Distillation(None, HeadFirst(), "corsd", layers=layers).to(DEVICE)(x, y[:2], y[1:3])
    module = Distillation(None, HeadFirst().to(DEVICE), "corsd", layers=layers, example=x)
    assert module(x, y[:2], y[1:3]).loss.isfinite()


def test_features_width_read_wrongly_is_told() -> None:
    x, y = images()
    options = {"layers": "layer1", "teacher_layers": "stages.2"}
    with pytest.raises(ValueError, match=r"\(\[3\], \[5\]\), but they are \(\[4\], \[5\]\).*example="):
        Distillation(network(), HeadFirst(), "mlkd", **options).to(DEVICE)(x, y)
    assert Distillation(network(), HeadFirst().to(DEVICE), "mlkd", example=x, **options)(x, y).loss.isfinite()
    # mlkd's heads do not depend on the logits, so theirs may be read wrongly
    Distillation(network(), HeadFirst(), "mlkd", layers="layer2", teacher_layers="stages.2").to(DEVICE)(x, y)


def test_a_methods_heads_belong_to_one_distillation() -> None:
    method = make_method("mlkd")
    Distillation(network(), network(), method)
    with pytest.raises(ValueError, match="MLKD has heads for another Distillation already"):
        Distillation(network(), network(), method)


def test_submodules_keep_their_modes() -> None:
    student, (x, y) = network(), images()
    student.stages[0].eval()
    modes = [module.training for module in student.modules()]
    Distillation(network(), student, "mlkd", example=x)
    assert [module.training for module in student.modules()] == modes
    evaluate(student, DataLoader(TensorDataset(x, y)))
    assert [module.training for module in student.modules()] == modes


def test_float64_stays() -> None:
    x, y = images()
    module = Distillation(network().double(), network().double(), "kd")
    assert module(x.double(), y).loss.dtype == torch.float64


def test_bad_methods_are_named() -> None:
    with pytest.raises(ValueError, match=", ".join(map(repr, METHODS)) + ", got 'crd'"):
        Distillation(network(), network(), "crd")
    with pytest.raises(ValueError, match="SP needs a teacher"):
        Distillation(None, network(), "sp")


def test_a_method_of_ones_own_trains_its_own_parameters() -> None:
    class Projected(Method):
        stages = "last"

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(5, 8, 1)

        def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
            return {"hint": F.mse_loss(self.head(student.features[0]), teacher.features[0])}

    module = Distillation(network(6, 7, 8), network(), Projected().to(DEVICE))
    module(*images()).loss.backward()
    assert module.method.head.weight.grad.norm() > 0
    assert any(p is module.method.head.weight for p in module.parameters())
