"""Primitives on feature maps, for losses of your own, and what the losses of maps check.

energy(x)           (1 / C) sum_c |x[c]|^p               (B, C, H, W) -> (B, H, W)
channel_gram(x, y)  sum over pixels of x[c] y[c']        (B, C, ...), (B, C', ...) -> (B, C, C')
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .ops.channel_gram import channel_gram as _channel_gram
from .ops.checks import (
    FLOATING,
    LAYER_REDUCTIONS,
    check_choice,
    check_number,
    check_reduction,
    check_tensor,
    compute_dtype,
    layer_numbers,
    layer_pairs,
)
from .ops.energy import Activation
from .ops.energy import energy as _energy


def energy(x: Tensor, p: float = 2.0, *, normalize: bool = False) -> Tensor:
    """The energy map of an activation: the mean over its channels of |x|^p.

    Args:
        x: (B, C, H, W); float16, bfloat16, float32 or float64, any strides: channels_last is read without a copy.
        p: 1 or more. 2 has kernels; other powers are computed in plain PyTorch on every backend.
        normalize: each sample's map divided by its L2 norm, or by 1e-12 if that is larger: F.normalize of the
            flattened map.

    Returns:
        (B, H, W), float32 (float64 for float64). Gradients flow to x.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes or options.
    """
    _check_floating(x, "energy: x")
    if x.dim() != 4:
        raise ValueError(f"energy: x must be (B, C, H, W), got {tuple(x.shape)}")
    return _energy(Activation(x, check_power(p, "energy: p"), bool(normalize)))


def channel_gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The products of all pairs of channels of a sample: G[b, c, c'] = sum over pixels of x[b, c] y[b, c'].

    It is a plain sum: divide by the number of pixels for FSP's matrices, or normalise rows, as you need it.

    Args:
        x, y: (B, C, ...) and (B, C', ...) with as many pixels, y = x by default; float16, bfloat16, float32 or
            float64, any strides.

    Returns:
        (B, C, C'), float32 (float64 if an input is), summed in that precision. Gradients flow to both.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes or devices.
    """
    y = x if y is None else y
    _check_floating(x, "channel_gram: x")
    _check_floating(y, "channel_gram: y")
    if x.device != y.device:
        raise ValueError(f"channel_gram: x is on {x.device} and y on {y.device}; move one of them")
    if x.dim() < 3 or y.dim() < 3 or x.shape[0] != y.shape[0] or x.shape[2:].numel() != y.shape[2:].numel():
        raise ValueError(
            f"channel_gram: x and y must be (B, C, ...) with the same B and as many pixels, got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    return _channel_gram(x, y)


def _check_floating(x: Tensor, name: str) -> None:
    check_tensor(name, x)
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_power(p: float, name: str) -> float:
    check_number(name, p)
    if not 1 <= p < float("inf"):
        raise ValueError(f"{name} must be 1 or more and finite, got {p}")
    return float(p)


def check_map_options(reduction: str, layer_reduction: str, caller: str) -> str:
    """The reduction, in the ops' words."""
    if layer_reduction not in LAYER_REDUCTIONS:
        check_choice(f"{caller}: layer_reduction", layer_reduction, LAYER_REDUCTIONS)
    return check_reduction(reduction, caller, batchmean=True)


def weights_of(layer_weights: Sequence[float] | None, layers: int, caller: str) -> list[float]:
    return [1.0] * layers if layer_weights is None else layer_numbers(layer_weights, caller, layers=layers)


def map_pairs(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], caller: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Checked layer pairs of (B, C, H, W), the larger map of each pair pooled to the smaller."""
    students, teachers = layer_pairs(student, teacher, caller)
    pairs = [_pooled_pair(s, t, caller) for s, t in zip(students, teachers, strict=True)]
    return [s for s, _ in pairs], [t for _, t in pairs]


def _pooled_pair(a: Tensor, b: Tensor, caller: str) -> tuple[Tensor, Tensor]:
    if a.dim() != 4 or b.dim() != 4:
        raise ValueError(
            f"{caller}: student and teacher must be (B, C, H, W), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.shape[2:] == b.shape[2:]:
        return a, b
    return pooled_to_smaller(a, b)


def pooled_to_smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both by adaptive average pooling to the smaller height and width."""
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    first, second = (x if x.shape[2:] == size else _pooled(x, size) for x in (a, b))
    return first, second


def _pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(x.to(compute_dtype(x)), size)


class ChannelGramLoss(nn.Module):
    """The options of a loss on channel Grams as a module; ``function`` is the loss."""

    function: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        layer_weights: Sequence[float] | None = None,
        reduction: str = "mean",
        layer_reduction: str = "sum",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.layer_weights = None if layer_weights is None else layer_numbers(layer_weights, name)
        self.reduction = check_map_options(reduction, layer_reduction, name)
        self.layer_reduction = layer_reduction

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        return type(self).function(
            student,
            teacher,
            layer_weights=self.layer_weights,
            reduction=self.reduction,
            layer_reduction=self.layer_reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"layer_weights={self.layer_weights}, reduction={self.reduction!r}, "
            f"layer_reduction={self.layer_reduction!r}"
        )
