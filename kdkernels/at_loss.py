"""Attention transfer (Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928), on activations.

m = (1 / C) sum_c |A[c]|^p;   u = m / max(||m||_2, 1e-12)        per sample, over the pixels
L = mean over the batch and the pixels of (u_student - u_teacher)^2, summed over the layers
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .feature_maps import check_map_options, check_power, map_pairs, weights_of
from .ops.checks import layer_numbers
from .ops.energy import AttentionPairs, attention


def at_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    p: float = 2.0,
    layer_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    layer_reduction: str = "sum",
) -> Tensor:
    """The squared distance between the attention maps of student and teacher.

    Args:
        student, teacher: (B, C, H, W) activations of one layer each, or two sequences of them (layer pairs). A pair
            agrees in B, the channels are free; of two sizes the larger map is pooled to the smaller (adaptive average
            pooling). float16, bfloat16, float32 or float64, any strides. No gradient flows to the teacher.
        p: 1 or more: the power of the activations. 2 has kernels; others are plain PyTorch.
        layer_weights: one number per layer pair; None is 1 for each.
        reduction: over the samples: "mean" (other libraries call it "batchmean", which works here too), "sum" or
            "none", one value per sample.
        layer_reduction: over the weighted layers: "sum", "mean" or "none", one value per layer.

    Returns:
        float32 (float64 if an input is): a scalar, (B,) or (L,) with one "none", (L, B) with both. A layer's value is
        at most 2 / (H W), so weights are large: 1000 is RepDistiller's and mdistiller's.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options.

    Source: RepDistiller's ``Attention``, mdistiller's ``at_loss`` (``reduction="mean"``, weight 1000). Both raise the
    activations themselves to the power p, without |.|: odd p differ where activations are negative. The paper's
    eq. 2 has half the L2 norm of the difference instead of its mean square.
    """
    students, teachers = map_pairs(student, teacher, "at_loss")
    weights = weights_of(layer_weights, len(students), "at_loss")
    reduction = check_map_options(reduction, layer_reduction, "at_loss")
    power = check_power(p, "at_loss: p")
    return attention(AttentionPairs(students, teachers, weights, reduction, layer_reduction, power))


class ATLoss(nn.Module):
    """``at_loss`` with its options as a module: ``ATLoss()(student_maps, teacher_maps)``."""

    def __init__(
        self,
        p: float = 2.0,
        layer_weights: Sequence[float] | None = None,
        reduction: str = "mean",
        layer_reduction: str = "sum",
    ) -> None:
        super().__init__()
        self.p = check_power(p, "ATLoss: p")
        self.layer_weights = None if layer_weights is None else layer_numbers(layer_weights, "ATLoss")
        self.reduction = check_map_options(reduction, layer_reduction, "ATLoss")
        self.layer_reduction = layer_reduction

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        return at_loss(
            student,
            teacher,
            p=self.p,
            layer_weights=self.layer_weights,
            reduction=self.reduction,
            layer_reduction=self.layer_reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"p={self.p}, layer_weights={self.layer_weights}, reduction={self.reduction!r}, "
            f"layer_reduction={self.layer_reduction!r}"
        )
