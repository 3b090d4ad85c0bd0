"""Inter-channel correlation (Liu et al., ICCV 2021, arXiv 2202.03680), ICKD-C.

K = X X^T (C, C), X (C, H W) a sample's activation;   G[i] = K[i] / max(||K[i]||_2, 1e-12)
L = (1 / (B C)) sum over the batch of ||G_student - G_teacher||_F^2
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .feature_maps import ChannelGramLoss, check_map_options, weights_of
from .ops.channel_gram import GramPairs, channel_distance
from .ops.checks import layer_pairs


def ickd_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    layer_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    layer_reduction: str = "sum",
) -> Tensor:
    """The squared distance between the row-normalised channel Gram matrices of student and teacher.

    Args:
        student, teacher: (B, C, ...) activations of one layer each, or two sequences of them (layer pairs). A pair
            agrees in B and C: project the student's channels, as the authors do by a 1 x 1 convolution and batch norm.
            Heights and widths are free. float16, bfloat16, float32 or float64, any strides. No gradient flows to the
            teacher.
        layer_weights: one number per layer pair; None is 1 for each.
        reduction: over the samples: "mean" (other libraries call it "batchmean", which works here too), "sum" or
            "none", one value per sample.
        layer_reduction: over the weighted layers: "sum", "mean" or "none", one value per layer.

    Returns:
        float32 (float64 if an input is): a scalar, (B,) or (L,) with one "none", (L, B) with both. A layer's value is
        at most 4, and at most 2 for activations that are not negative.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options.

    Source: the authors' ADLab-AutoDrive/ICKD, Cifar100/distiller_zoo/ICKD.py, behind its projection.
    """
    students, teachers = layer_pairs(student, teacher, "ickd_loss")
    for s, t in zip(students, teachers, strict=True):
        if s.dim() < 3 or t.dim() < 3 or s.shape[1] != t.shape[1]:
            raise ValueError(
                "ickd_loss: student and teacher must be (B, C, ...) with the same C (project the student), got "
                f"{tuple(s.shape)} and {tuple(t.shape)}"
            )
    weights = weights_of(layer_weights, len(students), "ickd_loss")
    reduction = check_map_options(reduction, layer_reduction, "ickd_loss")
    return channel_distance(GramPairs(students, teachers, weights, "ickd", reduction, layer_reduction))


class ICKDLoss(ChannelGramLoss):
    """``ickd_loss`` with its options as a module: ``ICKDLoss()(student_maps, teacher_maps)``."""

    function = ickd_loss
