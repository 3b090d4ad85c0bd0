"""Correlation Congruence (Peng et al., ICCV 2019, arXiv 1904.01802).

    c_ij = <x_i, x_j> / (|x_i| |x_j|)
    k_ij = exp(-2 gamma) sum over p = 0 .. order of (2 gamma c_ij)^p / p!     the Gaussian kernel's Taylor series
    L = mean over (i, j) of (k_s - k_t)^2

``neighbour_correlation_loss`` is the other formula that goes by this name.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from .ops.checks import (
    check_batches,
    check_choice,
    check_flag,
    check_positive,
    check_reduction,
    check_rows,
)
from .ops.neighbour_correlation import NeighbourRows, neighbour_correlation
from .ops.relation import CC
from .relations import relation_of

KERNELS = ("gaussian", "bilinear")


def cc_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The squared difference between the kernel matrices of student and teacher.

    Args:
        student, teacher: (B, ...) features; all sizes but B may differ. float16, bfloat16, float32 or float64, any
            strides. No gradient flows to the teacher.
        kernel: "gaussian", or "bilinear": k = c.
        gamma, order: of the Gaussian kernel; order is the highest power of c.
        normalize: divide rows by their length (or by 1e-12, if that is more); False: c_ij = <x_i, x_j>.
        reduction: "mean" over the B^2 pairs, or "sum".
        group: a torch.distributed group whose ranks' rows are one batch, see ``rkd_loss``.

    Returns:
        float32 (float64 if an input is). An empty batch gives 0. With ``normalize`` an all-zero row has cosine 0 with
        every row and gets no gradient, where the published code multiplies by 1e12.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options. If the calls of a group's ranks differ, all
            ranks raise; a missing rank raises the group's timeout error.

    Source: arXiv 1904.01802, eq. 6-10; values and defaults equal KD-Zoo's ``CC``. torchdistill's ``CCKDLoss`` is, with
    ``normalize=False``, ``cc_loss(reduction="sum").sqrt()``, over B^2 with its "batchmean".
    """
    caller = "cc_loss"
    check_batches(student, teacher, caller)
    options, reduction = _options(caller, kernel, gamma, order, normalize, reduction)
    return relation_of(student, teacher, options, reduction, group, caller)


def _options(caller: str, kernel: str, gamma: float, order: int, normalize: bool, reduction: str) -> tuple[CC, str]:
    check_choice(f"{caller}: kernel", kernel, KERNELS)
    check_positive(caller, gamma=gamma)
    if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order <= 100:
        raise ValueError(f"{caller}: order must be an int from 0 to 100, got {order!r}")
    check_flag(f"{caller}: normalize", normalize)
    return CC(normalize, float(gamma), order, kernel == "gaussian"), check_reduction(
        reduction, caller, per_sample=False
    )


class CCLoss(nn.Module):
    """``cc_loss`` with its options as a module: ``CCLoss()(student_features, teacher_features)``."""

    def __init__(
        self,
        kernel: str = "gaussian",
        gamma: float = 0.4,
        order: int = 2,
        normalize: bool = True,
        reduction: str = "mean",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _options("CCLoss", kernel, gamma, order, normalize, reduction)
        self.kernel, self.gamma, self.order, self.normalize = kernel, gamma, order, normalize
        self.reduction, self.group = reduction, group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cc_loss(
            student,
            teacher,
            kernel=self.kernel,
            gamma=self.gamma,
            order=self.order,
            normalize=self.normalize,
            reduction=self.reduction,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel={self.kernel!r}, gamma={self.gamma}, order={self.order}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}"
        )


def neighbour_correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RepDistiller's ``Correlation``: how much rows that follow each other are off at the same places.

        delta_i = |s_i - t_i|;   L = mean over i of <delta_i, delta_(i + 1)>

    Args:
        student, teacher: (N, d), the same d. No gradient flows to the teacher.

    Returns:
        float32 (float64 if an input is). Fewer than two rows give 0. It depends on the order of the rows.

    Source: RepDistiller's distiller_zoo/CC.py, which has it from the paper's first author; the paper's formula is
    ``cc_loss``.
    """
    check_rows(student, teacher, "neighbour_correlation_loss", same_width=True)
    return neighbour_correlation(NeighbourRows(student, teacher.detach()))
