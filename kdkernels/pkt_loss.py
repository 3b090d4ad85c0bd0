"""Probabilistic Knowledge Transfer (Passalis & Tefas, ECCV 2018, arXiv 1803.10837), with cosines.

c_ij = <u_i, u_j>,  u_i = x_i / (|x_i| + eps);   k = (c + 1) / 2;   p_ij = k_ij / sum over j of k_ij
L = mean over (i, j) of p_t log((p_t + eps) / (p_s + eps))
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from .ops.checks import check_batches, check_positive, check_reduction
from .ops.relation import PKT
from .relations import relation_of


def pkt_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: str = "mean",
    eps: float = 1e-7,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The divergence between the rows of cosine similarities of a batch, read as probabilities.

    Args:
        student, teacher: (B, ...) features; all sizes but B may differ. float16, bfloat16, float32 or float64, any
            strides. No gradient flows to the teacher.
        reduction: "mean" over the B^2 pairs, as published, which is why its usual weight is 30000; or "sum".
        eps: is added to norms and to probabilities.
        group: a torch.distributed group whose ranks' rows are one batch, see ``rkd_loss``.

    Returns:
        float32 (float64 if an input is). An empty batch gives 0, and B = 1 too: a row's probability of itself is 1. An
        all-zero row has cosine 0 with every row and gets no gradient, where the published code gives NaN.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options. If the calls of a group's ranks differ, all
            ranks raise; a missing rank raises the group's timeout error.

    Source: arXiv 1803.10837, eq. 5-7; values equal RepDistiller's ``PKT`` and mdistiller's ``pkt_loss``, both from the
    author's passalis/probabilistic_kt.
    """
    caller = "pkt_loss"
    check_batches(student, teacher, caller)
    check_positive(caller, eps=eps)
    reduction = check_reduction(reduction, caller, per_sample=False)
    return relation_of(student, teacher, PKT(float(eps)), reduction, group, caller)


class PKTLoss(nn.Module):
    """``pkt_loss`` with its options as a module: ``PKTLoss()(student_features, teacher_features)``."""

    def __init__(self, reduction: str = "mean", eps: float = 1e-7, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        check_positive("PKTLoss", eps=eps)
        self.reduction = check_reduction(reduction, "PKTLoss", per_sample=False)
        self.eps, self.group = eps, group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pkt_loss(student, teacher, reduction=self.reduction, eps=self.eps, group=self.group)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, eps={self.eps}"
