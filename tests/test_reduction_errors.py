"""reduction= of every loss and module: what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checking import DEVICE
from torch import Tensor

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
