"""Relational Knowledge Distillation (Park et al., CVPR 2019, arXiv 1904.05068).

    d_ij   = |x_i - x_j|,   D = d / mean of d over i != j
    A_ijk  = <e_ij, e_ik>,  e_ij = (x_j - x_i) / |x_j - x_i|
    L = w_d * mean over (i, j) of H(D_s - D_t) + w_a * mean over (i, j, k) of H(A_s - A_t)
    H(x) = x^2 / 2 for |x| < 1, else |x| - 1/2      smooth L1

All of it is a function of the B x B squared distances: A_ijk = (d_ij^2 + d_ik^2 - d_jk^2) / (2 d_ij d_ik).
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from .ops.checks import check_batches, check_flag, check_positive, check_reduction, check_weight
from .ops.relation import RKD
from .relations import relation_of


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
    reduction: str = "mean",
    eps: float = 1e-12,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Distances between all pairs and angles of all triples of a batch, the student's against the teacher's.

    Args:
        student, teacher: (B, ...) features, usually those in front of the classifier; all sizes but B may differ.
            float16, bfloat16, float32 or float64, any strides. No gradient flows to the teacher.
        distance_weight, angle_weight: of the two terms; 0 leaves one out. The angles cost B^3 operations.
        squared: squared distances in the distance term.
        reduction: "mean" over the B^2 pairs and the B^3 triples, or "sum".
        eps: a squared distance of two rows under this counts as this, without a gradient.
        group: a torch.distributed group, in which each rank calls with its own rows (any number): the batch is exactly
            the rows of all ranks. See ``sp_loss`` and kdkernels/distributed.py for its gradients. None: only this
            process's rows.

    Returns:
        float32 (float64 if an input is). B = 1 and an empty batch give 0. Distances are sums of squared differences in
        float64, so rows that are nearly equal keep their digits; rows closer than 1e-12 have no angle (0) and get no
        gradient from one, where the published code multiplies by 1e12. Memory is a few B x B matrices.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options. If the calls of a group's ranks differ, all
            ranks raise; a missing rank raises the group's timeout error.

    Source: arXiv 1904.05068, eq. 4-8; values and defaults equal RepDistiller's ``RKDLoss`` and mdistiller's ``RKD``,
    both from the authors' lenscloth/RKD.
    """
    caller = "rkd_loss"
    check_batches(student, teacher, caller)
    options, reduction = _options(caller, distance_weight, angle_weight, squared, reduction, eps)
    return relation_of(student, teacher, options, reduction, group, caller)


def _options(
    caller: str, distance_weight: float, angle_weight: float, squared: bool, reduction: str, eps: float
) -> tuple[RKD, str]:
    check_weight(caller, distance_weight=distance_weight, angle_weight=angle_weight)
    check_flag(f"{caller}: squared", squared)
    check_positive(caller, eps=eps)
    reduction = check_reduction(reduction, caller, per_sample=False)
    return RKD(float(distance_weight), float(angle_weight), float(eps), squared), reduction


class RKDLoss(nn.Module):
    """``rkd_loss`` with its options as a module: ``RKDLoss()(student_features, teacher_features)``."""

    def __init__(
        self,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        squared: bool = False,
        reduction: str = "mean",
        eps: float = 1e-12,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.options, self.reduction = _options("RKDLoss", distance_weight, angle_weight, squared, reduction, eps)
        self.group = group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        options = self.options._asdict()
        return rkd_loss(student, teacher, **options, reduction=self.reduction, group=self.group)

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options._asdict().items())
        return f"{options}, reduction={self.reduction!r}"
