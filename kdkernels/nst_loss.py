"""Neuron selectivity transfer (Huang & Wang 2017, arXiv 1707.01219) with the polynomial kernel (x . y)^2.

f[c] = A[c] / max(||A[c]||_2, 1e-12)                               each channel's map over the pixels
L = (1/C_s^2) sum (f_s[i] . f_s[j])^2 + (1/C_t^2) sum (f_t[i] . f_t[j])^2 - (2 / C_s C_t) sum (f_s[i] . f_t[j])^2
  = || f_s^T f_s / C_s - f_t^T f_t / C_t ||_F^2                    f as a matrix (C, H W);  mean over the batch
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .feature_maps import ChannelGramLoss, check_map_options, map_pairs, weights_of
from .ops.channel_gram import GramPairs, channel_distance


def nst_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    layer_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    layer_reduction: str = "sum",
) -> Tensor:
    """The squared maximum mean discrepancy between the channels of student and teacher.

    Matrix products of the smaller of channels and pixels a side; the published form has (B, C, C, H W) numbers.

    Args:
        student, teacher: (B, C, H, W) activations of one layer each, or two sequences of them (layer pairs). A pair
            agrees in B, the channels are free; of two sizes the larger map is pooled to the smaller (adaptive average
            pooling). float16, bfloat16, float32 or float64, any strides. No gradient flows to the teacher.
        layer_weights: one number per layer pair; None is 1 for each.
        reduction: over the samples: "mean" (other libraries call it "batchmean", which works here too), "sum" or
            "none", one value per sample.
        layer_reduction: over the weighted layers: "sum", "mean" or "none", one value per layer.

    Returns:
        float32 (float64 if an input is): a scalar, (B,) or (L,) with one "none", (L, B) with both. RepDistiller's and
        mdistiller's weight is 50.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options.

    Source: RepDistiller's ``NSTLoss``, mdistiller's ``nst_loss``, KD-Zoo's ``NST``: the same values. The constant term
    of the teacher is part of the value, so that it is never negative but for rounding.
    """
    students, teachers = map_pairs(student, teacher, "nst_loss")
    weights = weights_of(layer_weights, len(students), "nst_loss")
    reduction = check_map_options(reduction, layer_reduction, "nst_loss")
    return channel_distance(GramPairs(students, teachers, weights, "nst", reduction, layer_reduction))


class NSTLoss(ChannelGramLoss):
    """``nst_loss`` with its options as a module: ``NSTLoss()(student_maps, teacher_maps)``."""

    function = nst_loss
