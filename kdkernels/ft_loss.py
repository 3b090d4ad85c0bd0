"""The factor term of factor transfer (Kim, Park & Kwak, NeurIPS 2018, arXiv 1802.04977), on given factors.

m = (1 / C) sum_c |F[c]|^p1;   u = m / max(||m||_2, 1e-12)       per sample, over the pixels
L = mean over the batch and the pixels of |u_student - u_teacher|^p2
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .feature_maps import check_map_options, check_power, map_pairs, weights_of
from .ops.checks import layer_numbers
from .ops.energy import AttentionPairs, attention


def ft_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    p1: float = 2.0,
    p2: float = 1.0,
    layer_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    layer_reduction: str = "sum",
) -> Tensor:
    """The distance between the maps of student and teacher factors.

    The factors are the outputs of the method's two networks, the student's translator and the teacher's paraphraser,
    which are trained outside: any (B, C, H, W) will do.

    Args:
        student, teacher: (B, C, H, W) factors each, or two sequences of them (layer pairs). A pair
            agrees in B, the channels are free; of two sizes the larger map is pooled to the smaller (adaptive average
            pooling). float16, bfloat16, float32 or float64, any strides. No gradient flows to the teacher.
        p1: 1 or more: the power of the factors. 2 has kernels; others are plain PyTorch.
        p2: 1 or 2: the power of the maps' difference.
        layer_weights: one number per layer pair; None is 1 for each.
        reduction: over the samples: "mean" (other libraries call it "batchmean", which works here too), "sum" or
            "none", one value per sample.
        layer_reduction: over the weighted layers: "sum", "mean" or "none", one value per layer.

    Returns:
        float32 (float64 if an input is): a scalar, (B,) or (L,) with one "none", (L, B) with both. RepDistiller's
        weight is 200.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options.

    Source: RepDistiller's ``FactorTransfer(p1=2, p2=1)``, which raises to p1 without |.|. The paper compares the
    normalised factors themselves and not their energies over the channels.
    """
    students, teachers = map_pairs(student, teacher, "ft_loss")
    weights = weights_of(layer_weights, len(students), "ft_loss")
    reduction = check_map_options(reduction, layer_reduction, "ft_loss")
    power, absolute = check_power(p1, "ft_loss: p1"), _check_p2(p2, "ft_loss") == 1
    return attention(AttentionPairs(students, teachers, weights, reduction, layer_reduction, power, absolute))


def _check_p2(p2: float, caller: str) -> float:
    if p2 not in (1, 2):
        raise ValueError(f"{caller}: p2 must be 1 or 2, got {p2!r}")
    return float(p2)


class FTLoss(nn.Module):
    """``ft_loss`` with its options as a module: ``FTLoss()(student_factors, teacher_factors)``."""

    def __init__(
        self,
        p1: float = 2.0,
        p2: float = 1.0,
        layer_weights: Sequence[float] | None = None,
        reduction: str = "mean",
        layer_reduction: str = "sum",
    ) -> None:
        super().__init__()
        self.p1, self.p2 = check_power(p1, "FTLoss: p1"), _check_p2(p2, "FTLoss")
        self.layer_weights = None if layer_weights is None else layer_numbers(layer_weights, "FTLoss")
        self.reduction = check_map_options(reduction, layer_reduction, "FTLoss")
        self.layer_reduction = layer_reduction

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        return ft_loss(
            student,
            teacher,
            p1=self.p1,
            p2=self.p2,
            layer_weights=self.layer_weights,
            reduction=self.reduction,
            layer_reduction=self.layer_reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"p1={self.p1}, p2={self.p2}, layer_weights={self.layer_weights}, reduction={self.reduction!r}, "
            f"layer_reduction={self.layer_reduction!r}"
        )
