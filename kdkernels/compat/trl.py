"""TRL's distillation loss (github.com/huggingface/trl, 1.10): ``generalized_jsd_loss``.

    from kdkernels.compat.trl import generalized_jsd_loss        # was: GKDTrainer.generalized_jsd_loss

``GKDTrainer`` and ``DistillationTrainer`` call it as a static method, so a subclass, or one assignment, takes ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.checks import check_choice, check_labels, check_pair, compute_dtype
from ..stkd_loss import stkd_loss
from .scales import generalized_jsd, warn_of_trained_teacher

REDUCTIONS = ("batchmean", "sum", "mean", "none")


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, of teacher p and student q at temperature T.

    Args:
        student_logits, teacher_logits: (B, L, V), or any shape with the classes last.
        labels: (B, L); positions with the label -100 do not count. Nothing is shifted.
        beta: in [0, 1]. Quirk: at 0 it is KL(p || q) and at 1 KL(q || p), where the formula itself is 0.
        temperature: T. Quirk: there is no T^2.
        reduction: "batchmean" divides by the positions that count. Quirk: without labels it divides by B alone. Quirk:
            "mean" divides by positions times vocabulary, and "none" gives the elements of that mean, before any sum.
        num_items_in_batch: divides the sum, whatever the reduction.

    Use ``kdkernels.kd_loss(student, teacher, divergence="jsd", beta=beta, temperature=T, scale_by_t2=False)``, or
    ``kdkernels.linear_kd_loss``, which needs no logits.
    """
    check_pair(student_logits, teacher_logits, "generalized_jsd_loss")
    check_choice("generalized_jsd_loss: reduction", reduction, REDUCTIONS)
    warn_of_trained_teacher(teacher_logits)
    divergence, positions, counted = generalized_jsd(beta), student_logits.shape[:-1], None
    if labels is not None:
        check_labels("generalized_jsd_loss: labels", labels, positions, student_logits.device)
        counted = labels != -100
    if reduction == "none" and num_items_in_batch is None:
        elements = _elements(student_logits, teacher_logits.detach(), beta, temperature)
        return elements if counted is None else elements[counted]
    total = stkd_loss(
        student_logits,
        teacher_logits,
        # the only labels that matter here are those that say what does not count
        torch.zeros(positions, dtype=torch.int64, device=student_logits.device)
        if counted is None
        else counted.long() - 1,
        temperature=temperature,
        ce_weight=0.0,
        kd_weight=1.0,
        scale_by_t2=False,
        reduction="sum",
        ignore_index=-1,
        **divergence,
    )
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    if reduction == "sum":
        return total
    if reduction == "mean":
        count = positions.numel() if counted is None else counted.sum()
        return total / (count * student_logits.shape[-1])
    return total / (max(len(student_logits), 1) if counted is None else counted.sum().clamp_min(1))


def _elements(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Which no backend makes."""
    dtype = compute_dtype(student, teacher)
    log_q, log_p = (F.log_softmax(z.to(dtype) / temperature, -1) for z in (student, teacher))
    if beta == 0:
        return log_p.exp() * (log_p - log_q)
    if beta == 1:
        return log_q.exp() * (log_q - log_p)
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
