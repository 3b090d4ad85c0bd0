"""reduction= of every loss and module: three values that agree, whose gradients are the definition's, or a message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import DEVICE, by_definition, check_close, check_op, gradients
from torch import Tensor, nn

from kdkernels import (
    AlignmentLoss,
    AMDLoss,
    CorrelationLoss,
    CORSDLoss,
    KDLoss,
    MLKDLoss,
    SPLoss,
    STKDLoss,
    SupervisedContrastiveLoss,
    alignment_loss,
    amd_loss,
    correlation_loss,
    corsd_loss,
    kd_loss,
    mlkd_loss,
    sp_loss,
    stkd_loss,
    supervised_contrastive_loss,
)

N, C = 6, 5
TARGET = torch.tensor([0, 3, 1, 0, 4, 2], device=DEVICE)
LAM = torch.linspace(0.1, 0.9, N, dtype=torch.float64, device=DEVICE)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


# ---- numbers

Loss = Callable[..., Tensor]
# the loss, its module, the shapes of student and teacher, what else it takes, and the shape of its "none"
PER_SAMPLE: dict[str, tuple[Loss, type[nn.Module], list[tuple[int, ...]], tuple[Tensor, ...], tuple[int, ...]]] = {
    "kd": (kd_loss, KDLoss, [(N, C)] * 2, (), (N,)),
    "kd of positions": (kd_loss, KDLoss, [(N, 3, C)] * 2, (), (N, 3)),
    "stkd": (stkd_loss, STKDLoss, [(N, C)] * 2, (TARGET,), (N,)),
    "stkd mixed": (stkd_loss, STKDLoss, [(N, C)] * 2, (TARGET, TARGET.flip(0), LAM), (N,)),
    "amd": (amd_loss, AMDLoss, [(N, 3, 4, 4), (N, 2, 4, 4)], (), (N,)),
    "correlation": (correlation_loss, CorrelationLoss, [(4 * N, 7), (4 * N, C)], (), (3 * N,)),
    "alignment": (alignment_loss, AlignmentLoss, [(N, C)] * 2, (), (N,)),
    "supervised": (
        supervised_contrastive_loss,
        SupervisedContrastiveLoss,
        [(N, C)] * 2,
        (TARGET % 2,),
        (2 * N,),
    ),
}


@pytest.mark.parametrize("name", list(PER_SAMPLE))
@pytest.mark.usefixtures("backend")
def test_none_is_what_mean_and_sum_are_of(name: str) -> None:
    loss, module, shapes, rest, shape = PER_SAMPLE[name]
    student, teacher = (randn(*s).float() for s in shapes)
    rest = tuple(x.float() if x.is_floating_point() else x for x in rest)
    values = loss(student, teacher, *rest, reduction="none")
    assert values.shape == shape
    assert values.std() > 0.01 * values.mean().abs()
    for reduction, expected in (("mean", values.mean()), ("sum", values.sum()), ("none", values)):
        check_close(reduction, loss(student, teacher, *rest, reduction=reduction), expected, 1e-6)
        check_close(f"module, {reduction}", module(reduction=reduction)(student, teacher, *rest), expected, 1e-6)
    check_close("default", loss(student, teacher, *rest), values.mean(), 1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", list(PER_SAMPLE))
@pytest.mark.usefixtures("backend")
def test_gradients_meet_the_definition(name: str, reduction: str) -> None:
    """check_op's upstream gradient differs from value to value."""
    loss, _, shapes, rest, _ = PER_SAMPLE[name]
    student, teacher = (randn(*s).float() for s in shapes)
    rest = tuple(x.float() if x.is_floating_point() else x for x in rest)
    inputs, constants = ([student, teacher], []) if name == "supervised" else ([student], [teacher])

    def function(*tensors: Tensor) -> Tensor:
        return loss(*tensors, reduction=reduction)

    check_op(function, inputs, constants=[*constants, *rest])


def test_ignored_positions_are_0_and_not_in_the_mean() -> None:
    s, t = randn(N, C), randn(N, C)
    target = TARGET.clone()
    target[1] = target[4] = -100
    values = stkd_loss(s, t, target, reduction="none")
    assert (values == 0).tolist() == [False, True, False, False, True, False]
    torch.testing.assert_close(stkd_loss(s, t, target), values.sum() / 4)
    torch.testing.assert_close(stkd_loss(s, t, target, reduction="sum"), values.sum())


def scores(stages: int = 3) -> list[Tensor]:
    relations = [torch.rand(stages, N, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    return [x.requires_grad_() for x in (*relations, randn(stages, N, C), randn(stages, N, C))]


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("stages", [1, 3])
def test_corsd(stages: int, detach: bool) -> None:
    inputs, labels = scores(stages), (TARGET, (TARGET + 1) % C)
    options: dict[str, Any] = {"detach_deepest": detach}
    values = corsd_loss(*inputs, *labels, reduction="none", **options)
    assert values.shape == (N,)
    for i in range(N):  # a triplet's value is the loss of that triplet alone
        alone = corsd_loss(*(x[:, i : i + 1] for x in inputs), *(y[i : i + 1] for y in labels), **options)
        torch.testing.assert_close(values[i], alone)
    upstream = torch.linspace(1, 2, N, dtype=torch.float64, device=DEVICE)
    with by_definition():
        expected = corsd_loss(*inputs, *labels, reduction="none", **options)
        exact = gradients(expected, inputs, upstream)
    for actual, e in zip(gradients(values, inputs, upstream), exact, strict=True):
        torch.testing.assert_close(actual, e, rtol=1e-10, atol=1e-14)
    for reduction in ("mean", "sum"):
        whole = corsd_loss(*inputs, *labels, reduction=reduction, **options)
        values = corsd_loss(*inputs, *labels, reduction="none", **options)
        reduced = values.mean() if reduction == "mean" else values.sum()
        torch.testing.assert_close(whole, reduced)
        for a, e in zip(gradients(whole, inputs), gradients(reduced, inputs), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("relation", [0.0, 0.01])
def test_corsd_module(relation: float) -> None:
    features = [randn(3 * N, c, n, n) for c, n in ((4, 8), (6, 4))]
    logits = randn(3 * N, C)
    values = {}
    for reduction in ("mean", "sum", "none"):
        if reduction == "none" and relation:
            continue  # refused, see below
        torch.manual_seed(3)
        module = CORSDLoss((4, 6), C, logit_relation_weight=relation, reduction=reduction).to(DEVICE, torch.float64)
        values[reduction] = module.eval()(features, TARGET, (TARGET + 1) % C, logits)
    torch.testing.assert_close(values["sum"], N * values["mean"])
    if not relation:
        torch.testing.assert_close(values["none"].mean(), values["mean"])
        torch.testing.assert_close(values["none"].sum(), values["sum"])


def test_mlkd_sums_each_term() -> None:
    student, teacher = randn(4 * N, C), randn(4 * N, C)
    target = TARGET.repeat_interleave(4)
    expected = (
        50 * correlation_loss(student, teacher, reduction="sum")
        + supervised_contrastive_loss(student, teacher, target, reduction="sum")
        + 20 * alignment_loss(student, teacher, reduction="sum")
    )
    torch.testing.assert_close(mlkd_loss(student, teacher, TARGET, reduction="sum"), expected)
    torch.manual_seed(1)
    module = MLKDLoss(C, C, reduction="sum").to(DEVICE, torch.float64).eval()
    heads = [module.g_a(student), module.g_c(student), module.e_s(student)]
    whole = mlkd_loss(heads, [teacher, teacher, module.e_t(teacher)], TARGET, reduction="sum")
    torch.testing.assert_close(module(student, teacher, TARGET), whole)


@pytest.mark.parametrize("name", ["kd", "stkd", "sp", "alignment", "corsd"])
def test_batchmean_is_mean_where_that_is_the_same(name: str) -> None:
    s, t, triplets, labels = randn(N, C), randn(N, C), scores(), (TARGET, (TARGET + 1) % C)
    calls: dict[str, Loss] = {
        "kd": lambda **r: (kd_loss(s, t, **r), KDLoss(**r)(s, t)),
        "stkd": lambda **r: (stkd_loss(s, t, TARGET, **r), STKDLoss(**r)(s, t, TARGET)),
        "sp": lambda **r: (sp_loss(s, t, **r), SPLoss(**r)(s, t)),
        "alignment": lambda **r: (alignment_loss(s, t, **r), AlignmentLoss(**r)(s, t)),
        "corsd": lambda **r: (corsd_loss(*triplets, *labels, **r),),
    }
    mean = calls[name](reduction="mean")
    assert mean[0] > 0
    for value in (*mean, *calls[name](reduction="batchmean")):
        assert torch.equal(value, mean[0])
