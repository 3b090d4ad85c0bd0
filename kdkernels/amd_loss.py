"""AMD: Leveraging Angular Distributions for Improved Knowledge Distillation (Jeon et al. 2023, arXiv 2302.14130).

Per layer and sample, for student and teacher, over the pixels:

    r = sum_c A[c]^2;   q = r / (||r||_2 + 1e-6);   w = 1 - q            positive and negative map
    u = cos(m acos q),  m = 1.35;   G = -softplus(s (w - u)),  s = 64     the angular margin
    L = (1/3) [mse(G^) + mse(u^) + mse(w^)],  v^ = v / ||v||_2            mean over B and pixels

G is the paper's log(e^{su} / (e^{su} + e^{sw})), which written that way loses 10 % of its gradient in fp32 on maps
of 16 x 16.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from .ops.angular_margin import angular_margin
from .ops.angular_margin.op import check_options
from .ops.checks import check_choice, check_weight, layer_pairs

LAYER_REDUCTIONS = ("mean", "sum", "none")


def amd_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    margin: float = 1.35,
    scale: float = 64.0,
    local_weight: float = 0.0,
    layer_weights: Sequence[float] | str | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The distance between the angular distributions of student and teacher activations.

    Args:
        student, teacher: (B, C, H, W) activations of one layer each, or two sequences of them. A pair agrees in B, H
            and W; the channels are free. float16, bfloat16, float32 or float64, any strides: channels_last is read
            without a copy. No gradient flows to the teacher.
        margin: m in (0, 2], multiplies the angle of the positive map.
        scale: s > 0.
        local_weight: lambda in [0, 1]; L = (1 - lambda) global + lambda * mean over the four quadrants (0.2 in the
            paper's global + local form). Quadrants need H and W of 2 or more.
        layer_weights: one number per layer, None for all 1, or "area" for (H W)^2: the loss grows about 16 times with
            each halving of the map, so that without weights the smallest map is nearly all of it.
        reduction: over the weighted layers: "mean", "sum" or "none" (L,).

    Returns:
        float32 (float64 if an input is). The values are small, 1e-3 to 1e-6, so that weights of 30 to several thousand
        are usual. A single pixel and an empty batch give 0.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that cannot be meant, with both shapes.

    Source: arXiv 2302.14130, eq. 7-12; the authors' jeunsom/AMD_loss. Weights and reduction over layers are ours.
    """
    check_choice("reduction", reduction, LAYER_REDUCTIONS)
    students, teachers = layer_pairs(student, teacher, "amd_loss")
    if layer_weights is None:
        weights = [1.0] * len(students)
    elif isinstance(layer_weights, str):
        check_choice("layer_weights", layer_weights, ("area",))
        weights = [float(s.shape[-2] * s.shape[-1]) ** 2 for s in students]
    else:
        if not isinstance(layer_weights, Iterable):
            raise TypeError(f"layer_weights must be numbers, 'area' or None, got {type(layer_weights).__name__}")
        weights = list(layer_weights)
        for weight in weights:
            check_weight("layer_weights", weight)
    if reduction == "mean":
        weights = [weight / len(students) for weight in weights]
    return angular_margin(
        students,
        teachers,
        margin=margin,
        scale=scale,
        local_weight=local_weight,
        layer_weights=weights,
        reduce=reduction != "none",
    )


class AMDLoss(nn.Module):
    """``amd_loss`` with its options as a module: ``AMDLoss(local_weight=0.2)(student_maps, teacher_maps)``."""

    def __init__(
        self,
        margin: float = 1.35,
        scale: float = 64.0,
        local_weight: float = 0.0,
        layer_weights: Sequence[float] | str | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, LAYER_REDUCTIONS)
        check_options(margin, scale, local_weight)
        self.margin, self.scale, self.local_weight = margin, scale, local_weight
        self.layer_weights, self.reduction = layer_weights, reduction

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        return amd_loss(
            student,
            teacher,
            margin=self.margin,
            scale=self.scale,
            local_weight=self.local_weight,
            layer_weights=self.layer_weights,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin}, scale={self.scale}, local_weight={self.local_weight}"
