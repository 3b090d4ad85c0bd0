"""Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362) as MLKD uses it, between two networks' embeddings.

W = [student; teacher], 2 N rows;  l[i, j] = cos(w_i, w_j) / tau;  P(i) = the other rows of i's class;  m_i = max_j l_ij
L = mean over i of   m_i + log(1e-7 + sum_{j != i} e^{l_ij - m_i}) - mean over j in P(i) of l_ij

dL/dl_ij = (e^{l_ij - m_i} / (1e-7 + sum) - [j in P(i)] / |P(i)|) / 2N   for j != i, and from there through the cosines
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import cosine_over_ranks, describe, gather_labels, group_of_many, meet, replicate, shard_rows
from .ops.checks import check_labels, check_positive, check_reduction, check_rows, compute_dtype
from .ops.gram import cosine_similarity

DENOMINATOR_EPS = 1e-7


def supervised_contrastive_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.07,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Supervised contrastive loss over the 2 N rows of student and teacher together; gradients flow to both.

    Every row is an anchor. Its positives are the other rows of its class, always including its own image's row from the
    other network. A row is never compared with itself.

    Args:
        student, teacher: (N, d) embeddings of one width; they need not be normalised. float16, bfloat16, float32 or
            float64, any strides. The teacher's rows come from an embedding that is trained, so they get a gradient.
        target: (N,) int64 labels, one per row.
        temperature: tau > 0.
        reduction: "mean" over the 2 N anchors, "sum", or "none": one value per anchor, the student's rows first.
        group: as in ``correlation_loss``: the rows and labels of all ranks together.

    Returns:
        float32 (float64 if an input is). An empty batch gives 0. A row shorter than 1e-8 counts as 1e-8 long.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options. If the calls of a group's ranks differ, all
            ranks raise; a missing rank raises the group's timeout error.

    Source: arXiv 2004.11362, eq. 2, in the form of arXiv 2012.00573's code (ifding/DLKD), which adds the 1e-7.
    """
    caller = "supervised_contrastive_loss"
    check_rows(student, teacher, caller, same_width=True)
    check_positive(temperature=temperature)
    check_labels(f"{caller}: target", target, student.shape[:1], student.device)
    reduction = check_reduction(reduction, caller)
    many = group_of_many(group, caller)
    if many is None:
        dtype = compute_dtype(student, teacher)
        rows = torch.cat([student.to(dtype), teacher.to(dtype)])
        return _supervised(cosine_similarity(rows, rows), target, temperature, reduction)
    pair = f"student {describe([student])}, teacher {describe([teacher])}"
    ranks = meet(many, student.shape[0], f"{caller} of {pair}, {temperature=}, {reduction=}", student.device)
    rows = torch.cat([shard_rows(student, ranks), shard_rows(teacher, ranks)])
    similarity = cosine_over_ranks(rows, rows, ranks)
    return replicate(_supervised(similarity, gather_labels(target, ranks), temperature, reduction), ranks)


def _supervised(similarity: Tensor, target: Tensor, temperature: float, reduction: str) -> Tensor:
    logits = similarity / temperature
    if similarity.numel():
        logits = logits - logits.detach().amax(1, keepdim=True)
    own = torch.eye(similarity.shape[0], dtype=torch.bool, device=logits.device)
    denominator = logits.exp().masked_fill(own, 0).sum(1) + DENOMINATOR_EPS
    labels = target.repeat(2)
    positive = ((labels[:, None] == labels) & ~own).to(logits.dtype)
    anchors = denominator.log() - (logits * positive).sum(1) / positive.sum(1)
    if reduction == "none":
        return anchors
    return anchors.sum() / (max(anchors.shape[0], 1) if reduction == "mean" else 1)


class SupervisedContrastiveLoss(nn.Module):
    """``supervised_contrastive_loss`` as a module: ``SupervisedContrastiveLoss()(student, teacher, target)``."""

    def __init__(
        self, temperature: float = 0.07, reduction: str = "mean", group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature, self.group = temperature, group
        self.reduction = check_reduction(reduction, "SupervisedContrastiveLoss")

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return supervised_contrastive_loss(
            student, teacher, target, temperature=self.temperature, reduction=self.reduction, group=self.group
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
