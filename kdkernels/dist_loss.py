"""DIST: knowledge distillation from a stronger teacher (Huang et al. 2022, arXiv 2205.10536).

q = softmax(z / T), (N, C);   r = Pearson's correlation of the student's and the teacher's row or column
L = T^2 (beta mean over rows of (1 - r)  +  gamma mean over columns of (1 - r))

With a, b the student's and the teacher's row or column less its mean:  r = <a, b> / (|a| |b| + eps)
dr/da = b / (|a| |b| + eps) - r |b| a / (|a| (|a| |b| + eps)), and from there through the softmax
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from .distributed import of_all_rows
from .kd_loss import flatten_positions
from .ops.checks import check_positive, check_weight
from .ops.softmax_pearson import CorrelatedRows, softmax_pearson


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    class_dim: int = -1,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """1 - Pearson's correlation of the two networks' probabilities, over rows (beta) and over columns (gamma).

    Args:
        student_logits, teacher_logits: (N, C), (N, L, C), or any shape with the classes at ``class_dim`` ((N, C, H, W):
            1); all positions are rows. float16, bfloat16, float32 or float64, any strides. No gradient flows to the
            teacher.
        temperature: T > 0, with a factor T^2.
        beta: weight of the rows (the relations between classes), zero or positive.
        gamma: weight of the columns (those within a class, over the batch), zero or positive.
        class_dim: where the classes are.
        eps: is added to the product of the norms: a constant row or column has r = 0 and counts as 1.
        group: a torch.distributed group whose ranks' rows are one batch, which columns run over; every rank gathers the
            logits of all. Gradients follow ``sp_loss``'s convention: DistributedDataParallel's average is exact.

    Returns:
        float32 (float64 if an input is). An empty batch gives 0. A single row has columns of one number, which are
        constant: they count as 1 and have no gradient. There is no ``reduction``: two means make the loss.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options, with both shapes; ranks whose calls differ.

    Source: arXiv 2205.10536, eq. 5-8; values and defaults are those of ``DIST`` in hunto/DIST_KD.
    """
    _check_options("dist_loss", temperature, beta, gamma, eps)
    student, teacher = flatten_positions(student_logits, teacher_logits, class_dim, "dist_loss")
    options = float(temperature), float(beta), float(gamma), float(eps)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return softmax_pearson(CorrelatedRows(s, t, *options))

    return of_all_rows(loss, [student, teacher.detach()], group, f"dist_loss, {options}")


def _check_options(caller: str, temperature: float, beta: float, gamma: float, eps: float) -> None:
    check_positive(caller, temperature=temperature, eps=eps)
    check_weight(caller, beta=beta, gamma=gamma)


class DISTLoss(nn.Module):
    """``dist_loss`` with its options as a module: ``DISTLoss()(student_logits, teacher_logits)``."""

    def __init__(
        self,
        temperature: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        class_dim: int = -1,
        eps: float = 1e-8,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options("DISTLoss", temperature, beta, gamma, eps)
        self.temperature, self.beta, self.gamma = temperature, beta, gamma
        self.class_dim, self.eps, self.group = class_dim, eps, group

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return dist_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
            class_dim=self.class_dim,
            eps=self.eps,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, beta={self.beta}, gamma={self.gamma}, class_dim={self.class_dim}, "
            f"eps={self.eps}"
        )
