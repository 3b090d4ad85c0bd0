"""Flow of the solution procedure (Yim et al., CVPR 2017): the products of consecutive layers.

G[c', c] = (1 / H W) sum over the pixels of X[c'] Y[c],  Y a layer, X the next one       (C', C), per sample
L = mean over the batch and the matrix of (G_student - G_teacher)^2, summed over the pairs of layers
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from .feature_maps import ChannelGramLoss, check_map_options, pooled_to_smaller, weights_of
from .ops.channel_gram import GramPairs, channel_distance
from .ops.checks import layer_pairs


def fsp_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    layer_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    layer_reduction: str = "sum",
) -> Tensor:
    """The squared distance between the FSP matrices of student and teacher.

    Args:
        student, teacher: two sequences of L >= 2 activations (B, C, H, W), in the network's order. Layer by layer they
            agree in B and C; heights and widths are free. Of two consecutive layers the larger map is pooled to the
            smaller (adaptive average pooling). float16, bfloat16, float32 or float64, any strides. No gradient flows
            to the teacher.
        layer_weights: one number for each of the L - 1 matrices; None is 1 for each.
        reduction: over the samples: "mean" (other libraries call it "batchmean", which works here too), "sum" or
            "none", one value per sample.
        layer_reduction: over the weighted matrices: "sum", "mean" or "none", one value per matrix.

    Returns:
        float32 (float64 if an input is): a scalar, (B,) or (L - 1,) with one "none", (L - 1, B) with both. The value
        grows with the fourth power of the activations.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options.

    Source: RepDistiller's ``FSP``, which trains with it alone before it trains with labels, and KD-Zoo's. torchdistill
    pools by maximum.
    """
    students, teachers = layer_pairs(student, teacher, "fsp_loss")
    for s, t in zip(students, teachers, strict=True):
        if s.dim() != 4 or t.dim() != 4 or s.shape[1] != t.shape[1]:
            raise ValueError(
                "fsp_loss: student and teacher must be (B, C, H, W) with the same C layer by layer, got "
                f"{tuple(s.shape)} and {tuple(t.shape)}"
            )
    if len(students) < 2:
        raise ValueError(f"fsp_loss: needs two or more layers of each network, got {len(students)}")
    weights = weights_of(layer_weights, len(students) - 1, "fsp_loss")
    reduction = check_map_options(reduction, layer_reduction, "fsp_loss")
    return channel_distance(
        GramPairs(_consecutive(students), _consecutive(teachers), weights, "fsp", reduction, layer_reduction)
    )


def _consecutive(layers: list[Tensor]) -> list[Tensor]:
    """X, the deeper layer, of every pair, then every Y, pooled to one size."""
    pairs = [pooled_to_smaller(top, bottom) for bottom, top in pairwise(layers)]
    return [top for top, _ in pairs] + [bottom for _, bottom in pairs]


class FSPLoss(ChannelGramLoss):
    """``fsp_loss`` with its options as a module: ``FSPLoss()(student_stages, teacher_stages)``."""

    function = fsp_loss
