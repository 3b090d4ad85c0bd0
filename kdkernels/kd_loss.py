"""Knowledge distillation (Hinton, Vinyals & Dean 2015, arXiv 1503.02531).

q = softmax(z / T);   L = T^2 * mean over positions of KL(q_teacher || q_student)
dL/dz_s = T (q_s - q_t) / positions

``divergence=`` puts another one in the place of that KL, with p the teacher's and q the student's probabilities:

    reverse       KL(q || p)
    jsd           beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q    (GKD, arXiv 2306.13649)
    skew          KL(p || beta p + (1 - beta) q)                                         (DistiLLM, arXiv 2402.03898)
    skew_reverse  KL(q || (1 - beta) p + beta q)

``standardize=True`` takes (z - mean) / (std + 1e-7) of each position in the place of z (arXiv 2403.01427).
"""

from __future__ import annotations

from torch import Tensor, nn

from .ops.checks import REDUCTIONS, check_choice, check_number, check_pair, check_positive, check_reduction
from .ops.softmax_kl import Labels, Rows, Terms, softmax_kl

DIVERGENCES = {"forward": None, "reverse": None, "jsd": 0.5, "skew": 0.1, "skew_reverse": 0.1}  # and what beta is


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


def check_divergence(divergence: str, beta: float | None) -> tuple[str, float]:
    """The divergence and beta as the op takes them: with a beta of 0 a skewed KL is the plain one."""
    if divergence == "forward" and beta is None:  # nearly always
        return divergence, 0.5
    check_choice("divergence", divergence, tuple(DIVERGENCES))
    usual = DIVERGENCES[divergence]
    if usual is None:
        if beta is not None:
            raise ValueError(f"divergence={divergence!r} has no beta, got {beta}")
        return divergence, 0.5
    if beta is None:
        return divergence, usual
    check_number("beta", beta)
    if divergence == "jsd":
        if beta in (0, 1):
            name, kl = ("reverse", "KL(student || teacher)") if beta else ("forward", "KL(teacher || student)")
            raise ValueError(f"divergence='jsd' is 0 for beta={beta}; {kl}, which others mean by it, is {name!r}")
        if not 0 < beta < 1:
            raise ValueError(f"beta must be in (0, 1) for divergence='jsd', got {beta}")
    elif not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1) for divergence={divergence!r}, got {beta}")
    elif beta == 0:
        return "reverse" if divergence == "skew_reverse" else "forward", 0.5
    return divergence, float(beta)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: str = "mean",
    class_dim: int = -1,
    scale_by_t2: bool = True,
    divergence: str = "forward",
    beta: float | None = None,
    standardize: bool = False,
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
        divergence: "forward", KL(teacher || student); "reverse", "jsd", "skew" or "skew_reverse" in its place, as
            written above. "reverse" is infinite where the teacher gives a class no probability and the student does.
        beta: of "jsd" in (0, 1), 0.5 by default; of the skewed ones in [0, 1), 0.1 by default.
        standardize: whether both networks' logits get mean 0 and standard deviation 1 (unbiased, plus 1e-7) in each
            position. Logits without spread, as of one class, become 0; -inf among them makes the loss NaN.

    Returns:
        float32, or float64 if an input is. An empty batch gives 0.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options, with both shapes.

    Source: arXiv 1503.02531, section 2; the scale is that of RepDistiller's DistillKL. "jsd" is TRL's and Liger's, the
    skewed ones are DistiLLM's.
    """
    divergence, beta = check_divergence(divergence, beta)
    student, teacher = flatten_positions(student_logits, teacher_logits, class_dim, "kd_loss")
    check_positive(temperature=temperature)
    if reduction not in REDUCTIONS:
        reduction = check_reduction(reduction, "kd_loss", batchmean=student_logits.dim() == 2)
    terms = Terms(kl=temperature * temperature if scale_by_t2 else 1.0)
    rows = Rows(student, teacher, Labels(), terms, float(temperature), reduction, divergence, beta, bool(standardize))
    loss = softmax_kl(rows)
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
        divergence: str = "forward",
        beta: float | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        check_divergence(divergence, beta)
        check_positive(temperature=temperature)
        check_reduction(reduction, "KDLoss", batchmean=True)
        self.temperature, self.reduction = temperature, reduction
        self.class_dim, self.scale_by_t2 = class_dim, scale_by_t2
        self.divergence, self.beta, self.standardize = divergence, beta, standardize

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return kd_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            reduction=self.reduction,
            class_dim=self.class_dim,
            scale_by_t2=self.scale_by_t2,
            divergence=self.divergence,
            beta=self.beta,
            standardize=self.standardize,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, reduction={self.reduction!r}, class_dim={self.class_dim}, "
            f"scale_by_t2={self.scale_by_t2}, divergence={self.divergence!r}, beta={self.beta}, "
            f"standardize={self.standardize}"
        )
