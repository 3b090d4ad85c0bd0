"""torchdistill's losses (github.com/yoshitomo-matsubara/torchdistill, 1.1): ``KDLoss`` and ``SPKDLoss``.

Importing this module registers both in torchdistill's registry, where torchdistill is installed, under its own names,
so that a configuration needs one line and no other change:

    dependencies:
      - name: 'kdkernels.compat.torchdistill'
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.checks import check_choice, compute_dtype
from .scales import kl_per_sample, published_sp, warn_of_trained_teacher

IODict = Mapping[str, Mapping[str, Tensor]]
REDUCTIONS = ("batchmean", "sum", "mean", "none")


class KDLoss(nn.Module):
    """KL(softmax(teacher / T) || softmax(student / T)) of two modules' inputs or outputs, and the cross entropy.

    Args:
        student_module_path, student_module_io, teacher_module_path, teacher_module_io: where the logits are in the io
            dicts: ``student_io_dict[path][io]``, io "input" or "output". (N, C), or the classes in dimension 1.
        temperature: T.
        alpha, beta: alpha CE + beta T^2 KL; beta is 1 - alpha unless given.
        reduction: "batchmean" (sum over N; the CE a mean), "sum", "mean" (over N C elements) or "none" (elements).
        kwargs: ``torch.nn.CrossEntropyLoss``'s.

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
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io
        self.temperature, self.alpha, self.reduction = temperature, alpha, reduction
        self.beta = 1 - alpha if beta is None and alpha is not None else beta  # unused while alpha is None
        mean = "mean" if reduction == "batchmean" else reduction
        self.cross_entropy_loss = nn.CrossEntropyLoss(reduction=mean, **kwargs)

    def forward(
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
        loss = kl_per_sample(student, teacher, self.temperature, scale_by_t2=False)
        if self.reduction == "sum":
            return loss * len(student)
        return loss * (len(student) / max(student.numel(), 1)) if self.reduction == "mean" else loss


class SPKDLoss(nn.Module):
    """||G_t - G_s||_F^2 of two modules' outputs (B, ...), with similarity rows of L1 norm 1; a scalar.

    Args:
        student_output_path, teacher_output_path: ``student_io_dict[path]["output"]`` are the features.
        reduction: "batchmean" divides by B^2. Quirk: any other string is a plain sum.

    Quirk: rows are divided by their L1 norm, in the paper by their L2 norm, which makes this loss many times smaller
    (60 times at B = 64 on ordinary features): use ``kdkernels.sp_loss(student, teacher)``, or ``row_norm="l1"`` there.
    """

    def __init__(self, student_output_path: str, teacher_output_path: str, reduction: str, **kwargs: Any) -> None:
        super().__init__()
        self.student_output_path, self.teacher_output_path = student_output_path, teacher_output_path
        self.reduction = reduction

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor:
        student = student_io_dict[self.student_output_path]["output"]
        teacher = teacher_io_dict[self.teacher_output_path]["output"]
        return published_sp([student], [teacher], row_norm="l1", reduction=self.reduction)


def register() -> None:
    """Replace torchdistill's own two in its registry; called on import if torchdistill is installed."""
    from torchdistill.losses import mid_level  # noqa: F401  its own register themselves first, or they would replace ours
    from torchdistill.losses.registry import register_mid_level_loss

    for loss in (KDLoss, SPKDLoss):
        register_mid_level_loss(loss)


if importlib.util.find_spec("torchdistill") is not None:
    register()
