"""Liger-Kernel's distillation loss (github.com/linkedin/Liger-Kernel, 0.8): ``LigerFusedLinearJSDLoss``.

from kdkernels.compat.liger import LigerFusedLinearJSDLoss        # was: from liger_kernel.chunked_loss import ...
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..heads import Head
from ..linear_kd_loss import linear_kd_loss
from ..ops.checks import check_labels, check_pair, check_positive, check_weight
from .scales import generalized_jsd, warn_of_trained_teacher


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss CE + weight_soft_loss D of two heads' logits, over the tokens that count.

    Args:
        weight_hard_loss, weight_soft_loss: the weights.
        beta: D = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, of teacher p and student q. Quirk:
            at 0 it is KL(p || q) and at 1 KL(q || p), where the formula itself is 0.
        ignore_index: the label of a token that does not count, in either term.
        temperature: T of D. Quirk: there is no T^2.
        compiled: taken and of no effect: nothing here has to be compiled.
        chunk_size: tokens at a time, for a matrix of that many rows of logits.
        return_soft_hard_loss: (loss, D, CE); the last two without weights and, as there, without gradients.
        pad_smaller_vocabulary: not in the original, which always does it: a teacher with more tokens than the student
            gives D a student whose missing logits are 0, likely tokens among confident ones. The CE is not padded.
            Without it unequal vocabularies are an error: ``kdkernels.linear_kd_loss(..., vocab_size=)`` compares the
            tokens that both have.

    ``loss(student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias)``:
    hidden states (N, H) and (N, H_t), weights (V, H) and (V, H_t), int64 labels (N,), biases (V,). Use
    ``kdkernels.linear_kd_loss``.

    Better than the original: logits and the sums of the weight's gradient stay in float32, and no logits of all tokens
    are held.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        *,
        pad_smaller_vocabulary: bool = False,
    ) -> None:
        super().__init__()
        check_weight(weight_hard_loss=weight_hard_loss, weight_soft_loss=weight_soft_loss)
        check_positive(temperature=temperature)
        generalized_jsd(beta)
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.ignore_index, self.temperature, self.beta = ignore_index, temperature, beta
        self.compiled, self.chunk_size, self.return_soft_hard_loss = compiled, chunk_size, return_soft_hard_loss
        self.pad_smaller_vocabulary = pad_smaller_vocabulary

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        check_pair(student_input, teacher_input, type(self).__name__)
        check_labels("true_labels", true_labels, student_input.shape[:-1], student_input.device)
        for x in (teacher_input, teacher_weight):
            warn_of_trained_teacher(x)
        student = Head(student_input, student_weight, student_bias)
        teacher = Head(teacher_input, teacher_weight, teacher_bias)
        missing = teacher_weight.shape[0] - student_weight.shape[0]
        if missing > 0:
            if not self.pad_smaller_vocabulary:
                raise ValueError(
                    f"the student's vocabulary has {student_weight.shape[0]} tokens and the teacher's "
                    f"{teacher_weight.shape[0]}: pad_smaller_vocabulary=True sets the student's missing logits to 0, "
                    "as Liger does; kdkernels.linear_kd_loss(..., vocab_size=) compares those that both have"
                )
            return self._padded(student, teacher, true_labels, missing)
        loss = self._loss(student, teacher, true_labels, self.weight_hard_loss, self.weight_soft_loss)
        return self._with_parts(loss, student, student, teacher, true_labels)

    def _padded(
        self, student: Head, teacher: Head, labels: Tensor, missing: int
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The two terms on their own, as they have other classes."""
        bias = student.bias if student.bias is None else F.pad(student.bias, (0, missing))
        wide = student._replace(weight=F.pad(student.weight, (0, 0, 0, missing)), bias=bias)
        loss = self._loss(student, student, labels, self.weight_hard_loss, 0.0)
        loss = loss + self._loss(wide, teacher, labels, 0.0, self.weight_soft_loss)
        return self._with_parts(loss, student, wide, teacher, labels)

    def _with_parts(
        self, loss: Tensor, student: Head, wide: Head, teacher: Head, labels: Tensor
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if not self.return_soft_hard_loss:
            return loss
        with torch.no_grad():
            return loss, self._loss(wide, teacher, labels, 0.0, 1.0), self._loss(student, student, labels, 1.0, 0.0)

    def _loss(self, student: Head, teacher: Head, labels: Tensor, hard: float, soft: float) -> Tensor:
        options: dict[str, Any] = generalized_jsd(self.beta) if soft else {}
        return linear_kd_loss(
            student,
            teacher,
            labels,
            temperature=self.temperature,
            ce_weight=hard,
            kd_weight=soft,
            scale_by_t2=False,
            ignore_index=self.ignore_index,
            chunk=self.chunk_size,
            **options,
        )
