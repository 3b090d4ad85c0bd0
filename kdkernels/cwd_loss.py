"""CWD: channel-wise knowledge distillation for dense prediction (Shu et al., ICCV 2021, arXiv 2011.13256).

q = softmax over the pixels of a channel of x / T;   L = T^2 * mean over samples and channels of KL(q_t || q_s)
dL/dx_s = T (q_s - q_t) / (N C)
"""

from __future__ import annotations

from torch import Tensor, nn

from .ops.checks import REDUCTIONS, check_pair, check_positive, check_reduction
from .ops.softmax_kl import Rows, Terms, softmax_kl


def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, reduction: str = "mean") -> Tensor:
    """T^2 KL between the two networks' softmax over the pixels of each channel, averaged over samples and channels.

    Args:
        student, teacher: (N, C, H, W) logits or features, or (N, C, d1, ...) with one or more dimensions of pixels, of
            one shape: give the student a 1x1 convolution where the channels differ, and interpolate where the sizes
            do. float16, bfloat16, float32 or float64, any strides. No gradient flows to the teacher.
        temperature: T > 0.
        reduction: "mean" over samples and channels, "sum", or "none": (N, C).

    Returns:
        float32 (float64 if an input is). An empty batch gives 0. It is ``kd_loss(student.flatten(2),
        teacher.flatten(2))``.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options, with both shapes.

    Source: arXiv 2011.13256, eq. 3-4; values are those of ``CriterionCWD("channel", "kl", T)`` in
    irfanICMLL/TorchDistiller and of mmrazor's ``ChannelWiseDivergence``, whose default is T = 1.
    """
    caller = "cwd_loss"
    check_pair(student, teacher, caller)
    check_positive(caller, temperature=temperature)
    if student.dim() < 3 or student.shape != teacher.shape:
        raise ValueError(
            f"{caller}: student and teacher must be (N, C, H, W), of one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    if student.shape[2:].numel() == 0:
        raise ValueError(f"{caller}: there are no pixels in maps of shape {tuple(student.shape)}")
    if reduction not in REDUCTIONS:
        reduction = check_reduction(reduction, caller)
    s, t = (x.flatten(2).flatten(0, 1) for x in (student, teacher.detach()))
    terms = Terms(kl=temperature * temperature)
    loss = softmax_kl(Rows(s, t, terms=terms, temperature=float(temperature), reduction=reduction))
    return loss.view(student.shape[:2]) if reduction == "none" else loss


class CWDLoss(nn.Module):
    """``cwd_loss`` with its options as a module: ``CWDLoss()(student_maps, teacher_maps)``."""

    def __init__(self, temperature: float = 4.0, reduction: str = "mean") -> None:
        super().__init__()
        check_positive("CWDLoss", temperature=temperature)
        self.temperature, self.reduction = temperature, check_reduction(reduction, "CWDLoss")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cwd_loss(student, teacher, temperature=self.temperature, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
