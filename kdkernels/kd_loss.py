"""Knowledge distillation (Hinton, Vinyals & Dean 2015, arXiv 1503.02531).

q = softmax(z / T);   L = T^2 * mean over positions of KL(q_teacher || q_student)
dL/dz_s = T (q_s - q_t) / positions
"""

from __future__ import annotations

from torch import Tensor, nn

from .ops.checks import REDUCTIONS, check_pair, check_positive, check_reduction
from .ops.softmax_kl import Rows, Terms, softmax_kl


def flatten_positions(student: Tensor, teacher: Tensor, class_dim: int, caller: str) -> tuple[Tensor, Tensor]:
    """Logits with the classes at ``class_dim`` as (positions, C); the first dimension is the batch."""
    check_pair(student, teacher, caller)
    if student.dim() < 2 or student.shape != teacher.shape:
        raise ValueError(
            f"{caller}: student and teacher logits must have one shape of two or more dimensions, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if not -student.dim() <= class_dim < student.dim() or class_dim % student.dim() == 0:
        raise ValueError(
            f"{caller}: class_dim {class_dim} is not a dimension after the batch in {tuple(student.shape)}"
        )
    classes = student.shape[class_dim]
    if classes == 0:
        raise ValueError(f"{caller}: there are no classes in logits of shape {tuple(student.shape)}")
    teacher = teacher.detach()
    if student.dim() == 2:
        return student, teacher
    return student.movedim(class_dim, -1).reshape(-1, classes), teacher.movedim(class_dim, -1).reshape(-1, classes)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: str = "mean",
    class_dim: int = -1,
    scale_by_t2: bool = True,
) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), averaged over positions.

    Args:
        student_logits, teacher_logits: (N, C), (N, L, C), or any shape with the classes at ``class_dim`` ((N, C, H, W):
            1). float16, bfloat16, float32 or float64, any strides. No gradient flows to the teacher.
        temperature: T > 0.
        reduction: "mean" over all positions (rows of the softmax), "sum", or "none": one value per position, in the
            logits' shape without the classes. For (N, C) logits "batchmean" is the same as "mean".
        class_dim: where the classes are.
        scale_by_t2: multiply by T^2, which keeps the gradient's size when T changes. Other libraries' losses are this
            one times a factor: see the table in docs/kd.md.

    Returns:
        float32, or float64 if an input is. An empty batch gives 0.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options, with both shapes.

    Source: arXiv 1503.02531, section 2; the scale is that of RepDistiller's DistillKL.
    """
    student, teacher = flatten_positions(student_logits, teacher_logits, class_dim, "kd_loss")
    check_positive(temperature=temperature)
    if reduction not in REDUCTIONS:
        reduction = check_reduction(reduction, "kd_loss", batchmean=student_logits.dim() == 2)
    terms = Terms(kl=temperature**2 if scale_by_t2 else 1.0)
    loss = softmax_kl(Rows(student, teacher, terms=terms, temperature=float(temperature), reduction=reduction))
    if reduction != "none":
        return loss
    shape = list(student_logits.shape)
    del shape[class_dim]
    return loss.view(shape)


class KDLoss(nn.Module):
    """``kd_loss`` with its options as a module: ``KDLoss(temperature=4.0)(student_logits, teacher_logits)``."""

    def __init__(
        self,
        temperature: float = 4.0,
        reduction: str = "mean",
        class_dim: int = -1,
        scale_by_t2: bool = True,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        check_reduction(reduction, "KDLoss", batchmean=True)
        self.temperature, self.reduction = temperature, reduction
        self.class_dim, self.scale_by_t2 = class_dim, scale_by_t2

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return kd_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            reduction=self.reduction,
            class_dim=self.class_dim,
            scale_by_t2=self.scale_by_t2,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, reduction={self.reduction!r}, class_dim={self.class_dim}, "
            f"scale_by_t2={self.scale_by_t2}"
        )
