"""AMD: Leveraging Angular Distributions for Improved Knowledge Distillation (Jeon et al. 2023, arXiv 2302.14130).

Per layer and sample, for student and teacher, over the pixels:

    r = sum_c A[c]^2;   q = r / (||r||_2 + 1e-6);   w = 1 - q            positive and negative map
    u = cos(m acos q),  m = 1.35;   G = -softplus(s (w - u)),  s = 64     the angular margin
    L = (1/3) [mse(G^) + mse(u^) + mse(w^)],  v^ = v / ||v||_2            mean over B and pixels

G is the paper's log(e^{su} / (e^{su} + e^{sw})); written that way it loses 10 % of its gradient in fp32 on maps of
16 x 16.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .ops.angular_margin import ActivationPairs, angular_margin
from .ops.checks import (
    LAYER_REDUCTIONS,
    REDUCTIONS,
    check_choice,
    check_positive,
    check_reduction,
    check_weight,
    layer_numbers,
    layer_pairs,
)


def amd_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    margin: float = 1.35,
    sharpness: float = 64.0,
    local_weight: float = 0.0,
    layer_weights: Sequence[float] | str | None = None,
    reduction: str = "mean",
    layer_reduction: str = "sum",
) -> Tensor:
    """The distance between the angular distributions of student and teacher activations.

    Args:
        student, teacher: (B, C, H, W) activations of one layer each, or two sequences of them (layer pairs). A pair
            agrees in B, H and W; the channels are free. float16, bfloat16, float32 or float64, any strides:
            channels_last is read without a copy. No gradient flows to the teacher.
        margin: m in (0, 2], multiplies the angle of the positive map.
        sharpness: s > 0, of the softplus that compares the two maps.
        local_weight: lambda in [0, 1]; L = (1 - lambda) global + lambda * mean over the four quadrants (0.2 in the
            paper's global + local form). Quadrants need H and W of 2 or more.
        layer_weights: one number per layer pair, None for all 1, or "area" for (H W)^2: the loss grows about 16 times
            with each halving of the map, so without weights the smallest map is nearly all of it.
        reduction: over the samples: "mean", "sum" or "none", one value per sample.
        layer_reduction: over the weighted layers: "sum", "mean" or "none", one value per layer.

    Returns:
        float32 (float64 if an input is): a scalar, (B,) or (L,) with one "none", (L, B) with both. The values are
        small, 1e-3 to 1e-6, so weights of 30 to several thousand are usual; with "area" below 1 (the demo's is 0.2). A
        single pixel and an empty batch give 0.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options, with both shapes.

    Source: arXiv 2302.14130, eq. 7-12; the authors' jeunsom/AMD_loss. Weights and reduction over layers are ours.
    """
    students, teachers = layer_pairs(student, teacher, "amd_loss")
    _check_options(margin, sharpness, local_weight, layer_reduction)
    if reduction not in REDUCTIONS:
        reduction = check_reduction(reduction, "amd_loss", batchmean=True)
    for s, t in zip(students, teachers, strict=True):
        if s.dim() != 4 or t.dim() != 4 or s.shape[2:] != t.shape[2:]:
            raise ValueError(
                f"amd_loss: student and teacher must be (B, C, H, W) with the same H and W, got {tuple(s.shape)} and "
                f"{tuple(t.shape)}"
            )
        if local_weight and min(s.shape[2:]) < 2:
            raise ValueError(f"amd_loss: quadrants (local_weight > 0) need H and W of 2 or more, got {tuple(s.shape)}")
    area, weights = layer_weights == "area", [1.0] * len(students)
    if layer_weights is not None and not area:
        weights = layer_numbers(layer_weights, "amd_loss", layers=len(students), names="None, 'area'")
    return angular_margin(
        ActivationPairs(
            students,
            teachers,
            weights,
            area,
            reduction,
            layer_reduction,
            float(margin),
            float(sharpness),
            float(local_weight),
        )
    )


def _check_options(margin: float, sharpness: float, local_weight: float, layer_reduction: str) -> None:
    check_positive(margin=margin, sharpness=sharpness)
    check_weight(local_weight=local_weight)
    if margin > 2:
        raise ValueError(f"margin must be in (0, 2], got {margin}")
    if local_weight > 1:
        raise ValueError(f"local_weight must be in [0, 1], got {local_weight}")
    if layer_reduction not in LAYER_REDUCTIONS:
        check_choice("layer_reduction", layer_reduction, LAYER_REDUCTIONS)


class AMDLoss(nn.Module):
    """``amd_loss`` with its options as a module: ``AMDLoss(local_weight=0.2)(student_maps, teacher_maps)``."""

    def __init__(
        self,
        margin: float = 1.35,
        sharpness: float = 64.0,
        local_weight: float = 0.0,
        layer_weights: Sequence[float] | str | None = None,
        reduction: str = "mean",
        layer_reduction: str = "sum",
    ) -> None:
        super().__init__()
        _check_options(margin, sharpness, local_weight, layer_reduction)
        self.margin, self.sharpness, self.local_weight = margin, sharpness, local_weight
        if layer_weights is not None and layer_weights != "area":
            layer_weights = layer_numbers(layer_weights, "AMDLoss", names="None, 'area'")
        self.layer_weights, self.layer_reduction = layer_weights, layer_reduction
        self.reduction = check_reduction(reduction, "AMDLoss", batchmean=True)

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        return amd_loss(
            student,
            teacher,
            margin=self.margin,
            sharpness=self.sharpness,
            local_weight=self.local_weight,
            layer_weights=self.layer_weights,
            reduction=self.reduction,
            layer_reduction=self.layer_reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"margin={self.margin}, sharpness={self.sharpness}, local_weight={self.local_weight}, "
            f"layer_weights={self.layer_weights!r}, reduction={self.reduction!r}, "
            f"layer_reduction={self.layer_reduction!r}"
        )
