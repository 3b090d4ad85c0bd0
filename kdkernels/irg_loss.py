"""Edges of the instance relationship graph (Liu et al., "Knowledge Distillation via Instance Relationship Graph", CVPR
2019).

    d_ij = |x_i - x_j|^2,   E = d / max of d;   L = mean over (i, j) of (E_s - E_t)^2
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from .ops.checks import check_batches, check_flag, check_positive, check_reduction
from .ops.relation import IRG
from .relations import relation_of


def irg_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    squared: bool = True,
    reduction: str = "mean",
    eps: float = 1e-12,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The squared difference between the distances of all pairs of a batch, over the largest of them.

    Args:
        student, teacher: (B, ...) features; all sizes but B may differ. float16, bfloat16, float32 or float64, any
            strides. No gradient flows to the teacher.
        squared: compare squared distances (KD-Zoo), or their roots.
        reduction: "mean" over the B^2 pairs, or "sum".
        eps: a squared distance of two rows under this counts as this, without a gradient.
        group: a torch.distributed group whose ranks' rows are one batch, see ``rkd_loss``.

    Returns:
        float32 (float64 if an input is). B = 1 and an empty batch give 0. Distances are sums of squared differences, so
        rows that are nearly equal keep their digits.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options. If the calls of a group's ranks differ, all
            ranks raise; a missing rank raises the group's timeout error.

    The graph's vertices (the mean squared difference of the logits) and transformations (distances between one image's
    maps in two layers) compare no two images and are not here.

    Source: KD-Zoo's ``IRG``, whose three edge terms (two maps, one feature) are this loss of three pairs, averaged. The
    paper's own code is in Caffe.
    """
    caller = "irg_loss"
    check_batches(student, teacher, caller)
    options, reduction = _options(caller, squared, reduction, eps)
    return relation_of(student, teacher, options, reduction, group, caller)


def _options(caller: str, squared: bool, reduction: str, eps: float) -> tuple[IRG, str]:
    check_flag(f"{caller}: squared", squared)
    check_positive(caller, eps=eps)
    return IRG(float(eps), squared), check_reduction(reduction, caller, per_sample=False)


class IRGLoss(nn.Module):
    """``irg_loss`` with its options as a module: ``IRGLoss()(student_features, teacher_features)``."""

    def __init__(
        self,
        squared: bool = True,
        reduction: str = "mean",
        eps: float = 1e-12,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.options, self.reduction = _options("IRGLoss", squared, reduction, eps)
        self.group = group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return irg_loss(student, teacher, **self.options._asdict(), reduction=self.reduction, group=self.group)

    def extra_repr(self) -> str:
        return f"squared={self.options.squared}, reduction={self.reduction!r}, eps={self.options.eps}"
