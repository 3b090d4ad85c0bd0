"""torchtune's distillation loss (github.com/pytorch/torchtune, 0.7): ``ForwardKLLoss``.

from kdkernels.compat.torchtune import ForwardKLLoss        # was: from torchtune.modules.loss import ForwardKLLoss
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..kd_loss import kd_loss
from ..ops.checks import check_labels, check_pair
from ..stkd_loss import stkd_loss
from .scales import warn_of_trained_teacher


class ForwardKLLoss(nn.Module):
    """``ForwardKLLoss()(student_logits, teacher_logits, labels)``: -sum of p log q of teacher p and student q, T = 1.

    Args:
        ignore_index: the label of a position that does not count.

    student_logits, teacher_logits: (N, V), or any shape with the classes last; labels: int64 without the classes;
    normalize: divide by the positions that count.

    Quirk: it is the cross entropy with the teacher's probabilities, the KL plus the teacher's entropy, so it is not 0
    where both agree: use ``kdkernels.kd_loss(student, teacher, temperature=1)``, whose gradient is the same, or
    ``kdkernels.linear_kd_loss``, which needs no logits. Missing: classes where the student's logit is infinite are not
    left out: the loss is infinite there, unless the teacher's is too.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        check_pair(student_logits, teacher_logits, "ForwardKLLoss")
        check_labels("ForwardKLLoss: labels", labels, student_logits.shape[:-1], student_logits.device)
        warn_of_trained_teacher(teacher_logits)
        counted = labels != self.ignore_index
        kl = stkd_loss(
            student_logits,
            teacher_logits,
            counted.long() - 1,  # the only labels that matter are those that say what does not count
            temperature=1.0,
            ce_weight=0.0,
            kd_weight=1.0,
            reduction="sum",
            ignore_index=-1,
        )
        total = kl + torch.where(counted, _entropy(teacher_logits), 0).sum()
        return total / counted.sum().clamp_min(1) if normalize else total


def _entropy(logits: Tensor) -> Tensor:
    """Of each position: log V - KL(p || uniform), without a tensor of the logits' size."""
    logits = logits.detach()
    uniform = logits.new_zeros(()).expand_as(logits)
    return math.log(logits.shape[-1]) - kd_loss(uniform, logits, temperature=1.0, reduction="none")
