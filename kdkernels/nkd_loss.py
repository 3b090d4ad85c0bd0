"""NKD: normalised knowledge distillation (Yang et al. 2023, arXiv 2303.13005).

p = softmax(z);   y the label;   q^ = softmax(z / T) over the classes but y
L = mean over positions of  -p_t,y log p_s,y  -  gamma T^2 sum over k != y of q^_t,k log q^_s,k

dL/dz_s,k (times positions):   k = y: p_t,y (p_s,y - 1);   else p_t,y p_s,k + gamma T (q^_s,k - q^_t,k)

The second term is a cross entropy: that of the non-target classes in DKD (NCKD) plus the teacher's entropy among them.
"""

from __future__ import annotations

from torch import Tensor, nn

from .kd_loss import flatten_positions
from .ops.checks import REDUCTIONS, check_index, check_labels, check_positive, check_reduction, check_weight
from .ops.nkd import LabelledRows, nkd


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    gamma: float = 1.5,
    reduction: str = "mean",
    class_dim: int = -1,
    ignore_index: int = -100,
) -> Tensor:
    """The target's cross entropy times the teacher's probability of it, plus gamma T^2 times that among the others.

    Args:
        student_logits, teacher_logits: (N, C), (N, L, C), or any shape with the classes at ``class_dim`` ((N, C, H, W):
            1). float16, bfloat16, float32 or float64, any strides. No gradient flows to the teacher.
        target: int64 labels in the logits' shape without the classes. The published code takes the argmax of dense
            ones: ``target.argmax(class_dim)``.
        temperature: T > 0, of the non-target classes alone; the target's term is at temperature 1.
        gamma: weight of the non-target term, zero or positive.
        reduction: "mean" over the positions that count, "sum", or "none": one value per position, in the logits' shape
            without the classes. For (N, C) logits "batchmean" is the same as "mean".
        class_dim: where the classes are.
        ignore_index: positions with this label do not count and get no gradient.

    Returns:
        float32 (float64 if an input is). An empty batch, or one where nothing counts, gives 0. It is 0 for no other
        ordinary logits: its minimum is at q^_s = q^_t and p_s,y = 1.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices, labels or options. Labels on an accelerator
            are not read back to be checked: a label out of range makes its row's loss and gradient NaN.

    Source: arXiv 2303.13005; values, T = 1 and gamma = 1.5 are those of ``NKDLoss`` in yzd-v/cls_KD.
    """
    caller = "nkd_loss"
    check_positive(caller, temperature=temperature)
    check_weight(caller, gamma=gamma)
    if type(ignore_index) is not int:
        check_index(f"{caller}: ignore_index", ignore_index)
    student, teacher = flatten_positions(student_logits, teacher_logits, class_dim, caller)
    if reduction not in REDUCTIONS:
        reduction = check_reduction(reduction, caller, batchmean=student_logits.dim() == 2)
    shape = list(student_logits.shape)
    del shape[class_dim]
    check_labels(f"{caller}: target", target, shape, student.device)
    options = float(temperature), float(gamma), ignore_index, reduction
    loss = nkd(LabelledRows(student, teacher, target.reshape(-1), *options))
    return loss.view(shape) if reduction == "none" else loss


class NKDLoss(nn.Module):
    """``nkd_loss`` with its options as a module: ``NKDLoss()(student_logits, teacher_logits, target)``."""

    def __init__(
        self,
        temperature: float = 1.0,
        gamma: float = 1.5,
        reduction: str = "mean",
        class_dim: int = -1,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_positive("NKDLoss", temperature=temperature)
        check_weight("NKDLoss", gamma=gamma)
        check_reduction(reduction, "NKDLoss", batchmean=True)
        self.temperature, self.gamma, self.reduction = temperature, gamma, reduction
        self.class_dim, self.ignore_index = class_dim, ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        return nkd_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            gamma=self.gamma,
            reduction=self.reduction,
            class_dim=self.class_dim,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, gamma={self.gamma}, reduction={self.reduction!r}, "
            f"class_dim={self.class_dim}, ignore_index={self.ignore_index}"
        )
