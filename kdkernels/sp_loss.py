"""Similarity-Preserving Knowledge Distillation (Tung & Mori, ICCV 2019, arXiv 1907.09682).

Q = reshape(A) in R^{B x D};   K = Q Q^T;   G[i] = K[i] / max(||K[i]||_2, eps)
L = (1 / B^2) * sum over layer pairs of ||G_teacher - G_student||_F^2

R = (2 / B^2) (G_s - G_t);   H_i = (R_i - (R_i . G_i) G_i) / ||K_i||;   dL/dQ_s = (H + H^T) Q_s
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from .distributed import group_of_many, sp_over_ranks
from .ops.checks import LAYER_REDUCTIONS, check_choice, check_positive, check_reduction, layer_numbers, layer_pairs
from .ops.gram import ROW_NORMS, LayerPairs, SPOptions, sp_gram


def sp_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    row_norm: str = "l2",
    reduction: str = "mean",
    layer_weights: Sequence[float] | None = None,
    layer_reduction: str = "sum",
    eps: float = 1e-12,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The squared distance between the batch similarity matrices of student and teacher.

    Args:
        student, teacher: (B, ...) features of one layer each, or two sequences of them (layer pairs). They agree in B;
            all other sizes may differ. float16, bfloat16, float32 or float64, any strides: channels_last is read
            without a copy. No gradient flows to the teacher.
        row_norm: "l2" (the paper) or "l1" (torchdistill's).
        reduction: "mean" over the B^2 pairs of samples (other libraries call it "batchmean", which works here too), or
            "sum". There is no "none", as a sample has no value of its own.
        layer_weights: one number per layer pair; None is 1 for each.
        layer_reduction: over the weighted layers: "sum" (the paper), "mean" or "none" (L,).
        eps: rows of the Gram matrix with a smaller norm are divided by eps.
        group: a torch.distributed group, in which each rank calls with its own rows (any number): the batch is exactly
            the rows of all ranks in rank order. None: only this process's rows.

    Returns:
        float32 (float64 if an input is). For features that are not negative it is at most 2 / B per layer, which is
        why its usual weight is 3000. B = 1 and an empty batch give 0; an all-zero student row gets no gradient
        through its own normalisation.

    Without ``group`` each process of data-parallel training compares only its own batch. For B = 256 over 8 processes
    the loss is then 6 to 7 times that of one process, and its gradient points elsewhere (cosine 0.77 on random
    features, 0.93 on those of the demo's networks).
    With ``group`` the loss is the same number on every rank, and after DistributedDataParallel's averaging the
    parameters' gradients are those of one process on the whole batch. For this, ``backward`` gives each rank's features
    R times the gradient of the whole batch's loss, where R is the number of ranks. See kdkernels/distributed.py.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options, with both shapes. If the calls of a group's
            ranks differ, all ranks raise; a missing rank raises the group's timeout error.

    Source: arXiv 1907.09682, eq. 2-4; values equal RepDistiller's ``Similarity``.
    """
    students, teachers = layer_pairs(student, teacher, "sp_loss")
    weights = [1.0] * len(students)
    if layer_weights is not None:
        weights = layer_numbers(layer_weights, "sp_loss", layers=len(students))
    reduction = _check_options(row_norm, reduction, layer_reduction, eps)
    options = SPOptions(weights, reduction, layer_reduction, row_norm, float(eps))
    if group is not None and (many := group_of_many(group, "sp_loss")) is not None:
        return sp_over_ranks(students, teachers, options, many)
    return sp_gram(LayerPairs(students, teachers, options))


def _check_options(row_norm: str, reduction: str, layer_reduction: str, eps: float) -> str:
    if row_norm not in ROW_NORMS:
        check_choice("row_norm", row_norm, ROW_NORMS)
    if layer_reduction not in LAYER_REDUCTIONS:
        check_choice("layer_reduction", layer_reduction, LAYER_REDUCTIONS)
    check_positive(eps=eps)
    if reduction == "mean" or reduction == "sum":
        return reduction
    return check_reduction(reduction, "sp_loss", per_sample=False, batchmean=True)


class SPLoss(nn.Module):
    """``sp_loss`` with its options as a module: ``SPLoss()(student_features, teacher_features)``."""

    def __init__(
        self,
        row_norm: str = "l2",
        reduction: str = "mean",
        layer_weights: Sequence[float] | None = None,
        layer_reduction: str = "sum",
        eps: float = 1e-12,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options(row_norm, reduction, layer_reduction, eps)
        self.row_norm, self.reduction, self.eps, self.group = row_norm, reduction, eps, group
        self.layer_weights = None if layer_weights is None else layer_numbers(layer_weights, "SPLoss")
        self.layer_reduction = layer_reduction

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        return sp_loss(
            student,
            teacher,
            row_norm=self.row_norm,
            reduction=self.reduction,
            layer_weights=self.layer_weights,
            layer_reduction=self.layer_reduction,
            eps=self.eps,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"row_norm={self.row_norm!r}, reduction={self.reduction!r}, layer_weights={self.layer_weights}, "
            f"layer_reduction={self.layer_reduction!r}, eps={self.eps}"
        )
