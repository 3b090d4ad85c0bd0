"""reduction= of every loss and module: three values that agree, whose gradients are the definition's, or a message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import DEVICE, by_definition, check_close, check_op, gradients
from torch import Tensor, nn

import kdkernels
from kdkernels import (
    AlignmentLoss,
    AMDLoss,
    ATLoss,
    CCLoss,
    CorrelationLoss,
    CORSDLoss,
    CWDLoss,
    FSPLoss,
    FTLoss,
    Head,
    ICKDLoss,
    IRGLoss,
    KDLoss,
    LinearKDLoss,
    MLKDLoss,
    NKDLoss,
    NSTLoss,
    PKTLoss,
    RKDLoss,
    SPLoss,
    STKDLoss,
    SupervisedContrastiveLoss,
    alignment_loss,
    amd_loss,
    at_loss,
    cc_loss,
    correlation_loss,
    corsd_loss,
    cwd_loss,
    fsp_loss,
    ft_loss,
    ickd_loss,
    irg_loss,
    kd_loss,
    linear_kd_loss,
    mlkd_loss,
    nkd_loss,
    nst_loss,
    pkt_loss,
    rkd_loss,
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


# ---- what is refused

X, MAPS, A = torch.ones(4, 3, device=DEVICE), torch.ones(2, 3, 4, 4, device=DEVICE), TARGET[:4] * 0
STAGES = (
    torch.ones(2, 4, device=DEVICE),
    torch.ones(2, 4, device=DEVICE),
    X[None].repeat(2, 1, 1),
    X[None].repeat(2, 1, 1),
)
NOT_MEAN = "got 'batchmean': divide the 'sum' by the batch if that is what you want"
NO_SAMPLES = "reduction must be 'mean' or 'sum', got 'none': there is no value of a single sample"
REDUCED: dict[str, Callable[[str], object]] = {
    "kd_loss": lambda r: kd_loss(X, X, reduction=r),
    "kd_loss of positions": lambda r: kd_loss(MAPS, MAPS, class_dim=1, reduction=r),
    "stkd_loss": lambda r: stkd_loss(X, X, A, reduction=r),
    "stkd_loss of positions": lambda r: stkd_loss(X[None], X[None], A[None], reduction=r),
    "sp_loss": lambda r: sp_loss(X, X, reduction=r),
    "amd_loss": lambda r: amd_loss(MAPS, MAPS, reduction=r),
    "correlation_loss": lambda r: correlation_loss(X, X, reduction=r),
    "at_loss": lambda r: at_loss(MAPS, MAPS, reduction=r),
    "ft_loss": lambda r: ft_loss(MAPS, MAPS, reduction=r),
    "nst_loss": lambda r: nst_loss(MAPS, MAPS, reduction=r),
    "fsp_loss": lambda r: fsp_loss([MAPS] * 2, [MAPS] * 2, reduction=r),
    "ickd_loss": lambda r: ickd_loss(MAPS, MAPS, reduction=r),
    "rkd_loss": lambda r: rkd_loss(X, X, reduction=r),
    "pkt_loss": lambda r: pkt_loss(X, X, reduction=r),
    "cc_loss": lambda r: cc_loss(X, X, reduction=r),
    "irg_loss": lambda r: irg_loss(X, X, reduction=r),
    "nkd_loss": lambda r: nkd_loss(X, X, A, reduction=r),
    "cwd_loss": lambda r: cwd_loss(MAPS, MAPS, reduction=r),
    "linear_kd_loss": lambda r: linear_kd_loss(Head(X, X), Head(X, X), reduction=r),
    "alignment_loss": lambda r: alignment_loss(X, X, reduction=r),
    "supervised_contrastive_loss": lambda r: supervised_contrastive_loss(X, X, A, reduction=r),
    "mlkd_loss": lambda r: mlkd_loss(X, X, A, reduction=r),
    "corsd_loss": lambda r: corsd_loss(*STAGES, A, A + 1, reduction=r),
    "KDLoss": lambda r: KDLoss(reduction=r),
    "STKDLoss": lambda r: STKDLoss(reduction=r),
    "SPLoss": lambda r: SPLoss(reduction=r),
    "AMDLoss": lambda r: AMDLoss(reduction=r),
    "CorrelationLoss": lambda r: CorrelationLoss(reduction=r),
    "ATLoss": lambda r: ATLoss(reduction=r),
    "FTLoss": lambda r: FTLoss(reduction=r),
    "NSTLoss": lambda r: NSTLoss(reduction=r),
    "FSPLoss": lambda r: FSPLoss(reduction=r),
    "ICKDLoss": lambda r: ICKDLoss(reduction=r),
    "RKDLoss": lambda r: RKDLoss(reduction=r),
    "PKTLoss": lambda r: PKTLoss(reduction=r),
    "CCLoss": lambda r: CCLoss(reduction=r),
    "IRGLoss": lambda r: IRGLoss(reduction=r),
    "NKDLoss": lambda r: NKDLoss(reduction=r),
    "CWDLoss": lambda r: CWDLoss(reduction=r),
    "LinearKDLoss": lambda r: LinearKDLoss(reduction=r),
    "AlignmentLoss": lambda r: AlignmentLoss(reduction=r),
    "SupervisedContrastiveLoss": lambda r: SupervisedContrastiveLoss(reduction=r),
    "MLKDLoss": lambda r: MLKDLoss(3, 3, reduction=r),
    "CORSDLoss": lambda r: CORSDLoss((2, 4), 3, reduction=r),
}
CALLER = {"SPLoss": "sp_loss"}  # its function checks for it
RELATIONAL = ("rkd", "pkt", "cc", "irg")
NO_VALUE_OF_A_SAMPLE = {"sp_loss", "SPLoss", "mlkd_loss", "MLKDLoss"}
NO_VALUE_OF_A_SAMPLE |= {f"{x}_loss" for x in RELATIONAL} | {f"{x.upper()}Loss" for x in RELATIONAL}
NO_REDUCTION = {"dist_loss", "DISTLoss", "mlld_loss", "MLLDLoss", "neighbour_correlation_loss"}  # several means
BATCHMEAN = {"kd_loss", "KDLoss", "stkd_loss", "STKDLoss", "sp_loss", "SPLoss", "alignment_loss", "AlignmentLoss"}
BATCHMEAN |= {"corsd_loss", "CORSDLoss", "amd_loss", "AMDLoss"}
OF_SAMPLES = ("at", "ft", "nst", "fsp", "ickd", "nkd")
BATCHMEAN |= {f"{x}_loss" for x in OF_SAMPLES} | {f"{x.upper()}Loss" for x in OF_SAMPLES}


@pytest.mark.parametrize("name", list(REDUCED))
def test_an_invalid_reduction_is_named(name: str) -> None:
    call, caller = REDUCED[name], CALLER.get(name, name.split()[0])
    with pytest.raises(ValueError, match=f"{caller}: reduction must be 'mean'.* or '.*', got 'max'$"):
        call("max")
    if name in NO_VALUE_OF_A_SAMPLE:
        with pytest.raises(ValueError, match=f"{caller}: {NO_SAMPLES}"):
            call("none")
    else:
        call("none")
    if name in BATCHMEAN:
        call("batchmean")
    else:
        with pytest.raises(ValueError, match=f"{caller}: .*{NOT_MEAN}"):
            call("batchmean")


def test_every_loss_is_asked() -> None:
    losses = {name for name in kdkernels.__all__ if name.lower().endswith("loss")}
    assert losses == {name.split()[0] for name in REDUCED} | NO_REDUCTION


def test_the_logit_relation_has_no_value_of_a_triplet() -> None:
    with pytest.raises(ValueError, match=f"CORSDLoss: {NO_SAMPLES}"):
        CORSDLoss((2, 4), 3, logit_relation_weight=0.01, reduction="none")


def test_a_module_for_positions_takes_no_batchmean() -> None:
    """The module cannot know the shape; its call does."""
    for module, labels in ((KDLoss(reduction="batchmean"), ()), (STKDLoss(reduction="batchmean"), (A[None],))):
        with pytest.raises(ValueError, match=NOT_MEAN):
            module(X[None], X[None], *labels)
