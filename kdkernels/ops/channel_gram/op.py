"""channel_gram: per-sample products of channels, and the distance of two networks' products, with their gradients.

The formulas are in definition.py. The products are PyTorch's bmm. A distance makes its gradient in the forward pass,
some samples at a time, so that no product outlives the cache: what is saved is the gradient for an upstream gradient
of 1.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backend import choose
from ..checks import compute_dtype, grad_like
from ..energy.op import of_layers_and_samples, sample_factors
from ..library import Differentiable, build, may_hand_on, register

UNIT_EPS = 1e-12  # of norms of rows
KINDS = ("nst", "ickd", "fsp")


class GramPairs(NamedTuple):
    """What channel_distance computes."""

    student: list[Tensor]  # (B, C, ...) each; for fsp the rows X of all pairs, then the other layers' Y
    teacher: list[Tensor]  # constants
    layer_weights: list[float]  # one per pair
    kind: str
    reduction: str = "mean"  # over the samples; "sum", "none": (B,) or (L, B)
    layer_reduction: str = "sum"  # or "mean", "none": (L,) or (L, B)

    def factors(self) -> list[float]:
        """What each pair's value of a sample is multiplied by. Read inside the op, where sizes are plain numbers."""
        return sample_factors(self.layer_weights, self.student[0].shape[0], self.reduction, self.layer_reduction)

    def pairs(self, tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[tuple[Tensor, Tensor]]:
        """(X, Y) of each layer as (B, C, M); X twice but for fsp."""
        rows = [x.flatten(2) if dtype is None else x.to(dtype).flatten(2) for x in tensors]
        layers = len(self.layer_weights)
        return list(zip(rows[:layers], rows[layers:] if self.kind == "fsp" else rows, strict=True))

    @property
    def per_layer(self) -> bool:
        return self.layer_reduction == "none"

    @property
    def per_sample(self) -> bool:
        return self.reduction == "none"


class ChannelDistance(Protocol):
    """What an implementation has."""

    def supports(self, *tensors: Tensor) -> str | None:
        """None, or the reason why these tensors cannot be computed."""

    def forward(self, x: GramPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
        """The loss, and the gradients of all student tensors for an upstream one of 1, one behind the other (n,)."""


def channel_gram(a: Tensor, b: Tensor) -> Tensor:
    """(B, C, C') of (B, C, ...) and (B, C', ...): float32 (float64 if an input is), under autocast too.

    Arguments are the caller's to check: feature_maps.py does.
    """
    dtype = compute_dtype(a, b)
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a.to(dtype).flatten(2), b.to(dtype).flatten(2).mT)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    x = build(GramPairs, args)
    implementation: ChannelDistance = choose("channel_gram", *x.student, *x.teacher)
    return implementation.forward(x, args[-1])


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, need_grad = build(GramPairs, args), args[-1]
    like = x.student[0].new_empty((), dtype=compute_dtype(*x.student, *x.teacher))
    shape = [len(x.layer_weights)] * x.per_layer + [x.student[0].shape[0]] * x.per_sample
    return like.new_empty(shape), like.new_empty(sum(s.numel() for s in x.student) if need_grad else 0)


def _backward(grad: Tensor, unscaled: Tensor, student: list[Tensor], layers: int, reduction: str) -> list[Tensor]:
    """The upstream gradient times what the forward pass has made, in each layer's dtype and memory format."""
    upstream = of_layers_and_samples(grad, student[:layers], reduction)
    gradients = []
    starts = accumulate((s.numel() for s in student), initial=0)
    for i, (s, start) in enumerate(zip(student, starts, strict=False)):
        own = unscaled[start : start + s.numel()].view(s.shape)
        factor = upstream[i % layers].view(-1, *[1] * (s.dim() - 1))
        same = s.dtype == own.dtype
        gradients.append(torch.mul(own, factor, out=grad_like(s)) if same else grad_like(s).copy_(own * factor))
    return gradients


_backward_op = register(
    "channel_distance_backward",
    "(Tensor grad, Tensor unscaled, Tensor[] student, int layers, str reduction) -> Tensor[]",
    _backward,
    lambda grad, unscaled, student, layers, reduction: [grad_like(s) for s in student],
)


def _gradients(grad: Tensor, unscaled: Tensor, student: list[Tensor], layers: int, reduction: str) -> list[Tensor]:
    """What the forward pass has made, as it is where nothing is left to be done to it."""
    if may_hand_on(grad) and all(s.dtype == unscaled.dtype and s.is_contiguous() for s in student):
        return [g.view(s.shape) for s, g in zip(student, unscaled.split([s.numel() for s in student]), strict=True)]
    return _backward_op(grad, unscaled, student, layers, reduction)


_distance_op = Differentiable(
    "channel_distance",
    GramPairs,
    "Tensor loss, Tensor unscaled",
    _forward,
    _fake,
    keep=lambda args: (args[0], len(args[2]), args[4]),
    backward=_gradients,
)


def channel_distance(x: GramPairs) -> Tensor:
    """The pairs' weighted distances, reduced: float32 (float64 if an input is). Gradients flow to the student.

    Arguments are the caller's to check: nst_loss.py, ickd_loss.py and fsp_loss.py do.
    """
    return _distance_op(x)
