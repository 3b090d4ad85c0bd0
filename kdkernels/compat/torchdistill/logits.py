"""torchdistill's losses of two modules' logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.checks import check_choice, compute_dtype
from ...ops.softmax_kl.op import STANDARD_EPS
from ..scales import in_compute_dtype, kl_per_sample, warn_of_trained_teacher

IODict = Mapping[str, Mapping[str, Tensor]]
REDUCTIONS = ("batchmean", "sum", "mean", "none")


class KDLoss(nn.KLDivLoss):
    """KL(softmax(teacher / T) || softmax(student / T)) of two modules' inputs or outputs, and the cross entropy.

    Args:
        student_module_path, student_module_io, teacher_module_path, teacher_module_io: where the logits are in the io
            dicts: ``student_io_dict[path][io]``, io "input" or "output". (N, C), or the classes in dimension 1.
        temperature: T.
        alpha, beta: alpha CE + beta T^2 KL; beta is 1 - alpha unless given.
        reduction: "batchmean" (sum over N; the CE a mean), "sum", "mean" (over N C elements) or "none" (elements).
        kwargs: ``torch.nn.CrossEntropyLoss``'s.

    It is a ``torch.nn.KLDivLoss``, as torchdistill's own.

    Quirk: without targets, or with alpha None or 0, the result is the plain KL: no T^2 and no beta, so 1/16 of others'
    at T = 4: use ``kdkernels.kd_loss(student, teacher, temperature=T)``. With alpha and targets it is
    ``kdkernels.stkd_loss(student, teacher, targets, temperature=T, ce_weight=alpha, kd_weight=beta)``.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        check_choice("reduction", reduction, REDUCTIONS)
        super().__init__(reduction=reduction)
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io
        self.temperature, self.alpha = temperature, alpha
        self.beta = 1 - alpha if beta is None and alpha is not None else beta  # unused while alpha is None
        mean = "mean" if reduction == "batchmean" else reduction
        self.cross_entropy_loss = nn.CrossEntropyLoss(reduction=mean, **kwargs)

    def forward(  # type: ignore[override]
        self, student_io_dict: IODict, teacher_io_dict: IODict, targets: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        student = student_io_dict[self.student_module_path][self.student_module_io]
        teacher = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        soft_loss = self.soft_loss(student, teacher)
        if self.alpha is None or self.alpha == 0 or self.beta is None or targets is None:
            return soft_loss
        hard_loss = self.cross_entropy_loss(student.to(compute_dtype(student)), targets)
        return self.alpha * hard_loss + self.beta * self.temperature**2 * soft_loss

    def soft_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL without T^2, reduced."""
        if self.reduction == "none":  # elements, which no kernel gives
            warn_of_trained_teacher(teacher)
            dtype = compute_dtype(student, teacher)
            log_q = F.log_softmax(student.to(dtype) / self.temperature, 1)
            q = F.softmax(teacher.detach().to(dtype) / self.temperature, 1)
            return F.kl_div(log_q, q, reduction="none")
        return self.reduced(student, kl_per_sample(student, teacher, self.temperature, scale_by_t2=False))

    def reduced(self, student: Tensor, loss: Tensor) -> Tensor:
        """From the sum over N."""
        if self.reduction == "sum":
            return loss * student.shape[0]
        return loss * (student.shape[0] / max(student.numel(), 1)) if self.reduction == "mean" else loss


class LogitStdKDLoss(KDLoss):
    """``KDLoss`` with the soft loss of standardised logits (arXiv 2403.01427).

    Args:
        eps: beside the standard deviation.
        other arguments, and the quirk of alpha: as ``KDLoss``'s. The cross entropy takes the logits as they are.

    Quirk: the mean and the standard deviation are over the last dimension, the softmax over dimension 1: use (N, C)
    logits, or ``kdkernels.kd_loss(student, teacher, class_dim=..., standardize=True)``.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        eps: float = 1e-7,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        modules = student_module_path, student_module_io, teacher_module_path, teacher_module_io
        super().__init__(*modules, temperature, alpha, beta, reduction, **kwargs)
        self.eps = eps

    def soft_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.reduction == "none" or self.eps != STANDARD_EPS or student.dim() != 2:
            return super().soft_loss(self.standardize(student), self.standardize(teacher))
        loss = kl_per_sample(student, teacher, self.temperature, scale_by_t2=False, standardize=True)
        return self.reduced(student, loss)

    def standardize(self, logits: Tensor) -> Tensor:
        z = in_compute_dtype(logits)
        return (z - z.mean(-1, keepdim=True)) / (self.eps + z.std(-1, keepdim=True))


class SKDInstanceLoss(nn.Module):
    """KL(softmax(teacher / T) || softmax(student / T)), summed, over N.

    Quirk: no T^2: use ``kdkernels.kd_loss(student, teacher, temperature=T)`` for the usual scale.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float = 4.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io
        self.temperature = temperature

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor:
        student = student_io_dict[self.student_module_path][self.student_module_io]
        teacher = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        return kl_per_sample(student, teacher, self.temperature, scale_by_t2=False)
