"""MLKD: Multi-level Knowledge Distillation via Knowledge Alignment and Correlation (Ding et al., arXiv 2012.00573;
TNNLS 35(2), 2024, as "DLKD"). Not "Multi-Level Logit Distillation" (CVPR 2023), which other libraries also call MLKD.

Each of B images gives V views, row V b + r being view r of image b.

    L = alpha correlation + beta supervised + delta alignment          plus the task's cross entropy

    alignment      of g_a(f_s) and f_t: alignment_loss.py
    correlation    of g_c(f_s) and f_t: correlation_loss.py
    supervised     of e_s(f_s) and e_t(f_t): supervised_contrastive_loss.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .alignment_loss import alignment_loss
from .batch_norm import BatchNorm1d, set_group
from .correlation_loss import check_views, correlation_loss
from .distributed import group_of_many
from .ops.checks import HALF, check_positive, check_reduction, check_rows, check_tensor, check_weight, compute_dtype
from .supervised_contrastive_loss import supervised_contrastive_loss

Rows = Tensor | Sequence[Tensor]


def mlkd_loss(
    student: Rows,
    teacher: Rows,
    target: Tensor | None = None,
    *,
    views: int = 4,
    correlation_weight: float = 50.0,
    supervised_weight: float = 1.0,
    alignment_weight: float = 20.0,
    temperature: float = 0.5,
    supervised_temperature: float = 0.07,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """alpha * correlation + beta * supervised + delta * alignment on projected features.

    Args:
        student, teacher: (V B, d) features for all three terms, or three tensors each, for the alignment, the
            correlation and the supervised term in this order. ``MLKDLoss`` owns the projections and calls this. No
            gradient flows to the teacher, but to the last of its three, which is an embedding that is trained.
        target: int64 labels, (B,) one per image or (V B,) one per row. None: no labels and no supervised term (our
            reading of a self-supervised teacher; leave out the task's cross entropy as well).
        views: V, see ``correlation_loss``.
        correlation_weight, supervised_weight, alignment_weight: alpha, beta, delta: 50, 1, 20 for CIFAR-100; 20, 0.5,
            10 for ImageNet. A term of weight 0 is not computed. The task's cross entropy on the base rows is the
            trainer's, with weight 1.
        temperature, supervised_temperature: of the correlation and of the supervised term.
        reduction: "mean": each term's mean over its own rows; "sum": each term's sum. There is no "none", as the terms
            have different rows.
        group: the correlation and the supervised term are of the whole group's batch, see ``correlation_loss``. The
            alignment is a mean over this rank's rows, like a cross entropy, so it differs between ranks.

    Returns:
        A float32 scalar (float64 if an input is).

    Raises:
        TypeError, ValueError: what the three terms raise, and invalid options.

    Source: arXiv 2012.00573, with the weights of the authors' ifding/DLKD. There is no logit term.
    """
    check_weight(
        correlation_weight=correlation_weight, supervised_weight=supervised_weight, alignment_weight=alignment_weight
    )
    check_positive(temperature=temperature, supervised_temperature=supervised_temperature)
    reduction = check_reduction(reduction, "mlkd_loss", per_sample=False)
    students = _three(student, "student")
    teachers = _three(teacher.detach() if isinstance(teacher, Tensor) else teacher, "teacher")
    check_rows(students[1], teachers[1], "mlkd_loss", same_width=False)
    check_views(views, students[1].shape[0], "mlkd_loss")
    if target is None and not correlation_weight and not alignment_weight:
        raise ValueError("mlkd_loss: without a target, correlation_weight=0 and alignment_weight=0 leave no term")
    loss = torch.zeros((), dtype=compute_dtype(*students, *teachers), device=students[1].device)
    if correlation_weight:
        loss = loss + correlation_weight * correlation_loss(
            students[1], teachers[1], views=views, temperature=temperature, reduction=reduction, group=group
        )
    if supervised_weight and target is not None:
        loss = loss + supervised_weight * supervised_contrastive_loss(
            students[2],
            teachers[2],
            _target_of_rows(target, students[2].shape[0], views),
            temperature=supervised_temperature,
            reduction=reduction,
            group=group,
        )
    if alignment_weight:
        loss = loss + alignment_weight * alignment_loss(students[0], teachers[0], reduction=reduction)
    return loss


def _target_of_rows(target: Tensor, rows: int, views: int) -> Tensor:
    """A label for every row."""
    check_tensor("mlkd_loss: target", target)
    if target.shape == (rows // views,):
        return target.repeat_interleave(views)
    if target.shape != (rows,):
        raise ValueError(
            f"mlkd_loss: target must have shape ({rows // views},) or ({rows},) for {rows} rows of {views} views, "
            f"got {tuple(target.shape)}"
        )
    return target


def _three(rows: Rows, name: str) -> list[Tensor]:
    if isinstance(rows, Tensor):
        # the terms' gradients are added before they are rounded to half precision
        return [rows.to(torch.float32) if rows.dtype in HALF else rows] * 3
    three = list(rows)
    if len(three) != 3:
        raise ValueError(f"mlkd_loss: {name} must be one tensor or three (alignment, correlation, supervised)")
    return three


def _head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class MLKDLoss(nn.Module):
    """``mlkd_loss`` with its four heads: ``MLKDLoss(128, 512)(student_features, teacher_features, target)``.

        g_a   Linear(d_s, 16 d_t) - BN - ReLU - Linear(16 d_t, d_t)       alignment
        g_c   Linear(d_s, d_s) - BN - ReLU - Linear(d_s, d_s)             correlation
        e_s, e_t   Linear(d_s, 128), Linear(d_t, 128)                     supervised

    Their parameters train with the student: give ``loss.parameters()`` to the optimizer, and in data-parallel training
    wrap this module like the student. They are dropped afterwards. With ``supervised_weight=0`` there are no e_s and
    e_t; use that for training without labels, where their parameters would stay unused.

    Args:
        student_dim, teacher_dim: d_s and d_t, the widths of the features.
        embedding_dim: the width of e_s and e_t.
        The others: as in ``mlkd_loss``.

    Source: arXiv 2012.00573; ifding/DLKD.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        embedding_dim: int = 128,
        views: int = 4,
        correlation_weight: float = 50.0,
        supervised_weight: float = 1.0,
        alignment_weight: float = 20.0,
        temperature: float = 0.5,
        supervised_temperature: float = 0.07,
        reduction: str = "mean",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        sizes = {"student_dim": student_dim, "teacher_dim": teacher_dim, "embedding_dim": embedding_dim}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"MLKDLoss: {name} must be a positive int, got {size!r}")
        check_positive(temperature=temperature, supervised_temperature=supervised_temperature)
        check_weight(
            correlation_weight=correlation_weight,
            supervised_weight=supervised_weight,
            alignment_weight=alignment_weight,
        )
        check_views(views, 0, "MLKDLoss")
        self.options: dict[str, Any] = {
            "views": views,
            "correlation_weight": correlation_weight,
            "supervised_weight": supervised_weight,
            "alignment_weight": alignment_weight,
            "temperature": temperature,
            "supervised_temperature": supervised_temperature,
            "reduction": check_reduction(reduction, "MLKDLoss", per_sample=False),
        }
        self.group = group
        self.g_a = _head(student_dim, 16 * teacher_dim, teacher_dim)
        self.g_c = _head(student_dim, student_dim, student_dim)
        self.e_s = nn.Linear(student_dim, embedding_dim) if supervised_weight else None
        self.e_t = nn.Linear(teacher_dim, embedding_dim) if supervised_weight else None

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of pooled penultimate features.

        Args:
            student, teacher: (V B, d_s) and (V B, d_t), row V b + r being view r of image b; no gradient
                flows to the teacher.
            target: int64 labels, (B,) or (V B,), or None.
        """
        set_group(self, group_of_many(self.group, "MLKDLoss"))  # the heads' batch is that of the loss
        teacher = teacher.detach()
        students, teachers = [self.g_a(student), self.g_c(student), student], [teacher, teacher, teacher]
        if self.e_s is not None and self.e_t is not None and target is not None:
            students[2], teachers[2] = self.e_s(student), self.e_t(teacher)
        target = target if self.e_s is not None else None
        return mlkd_loss(students, teachers, target, **self.options, group=self.group)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
