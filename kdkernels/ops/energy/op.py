"""energy: the map of an activation's |A|^p over its channels, the distance of two networks' maps, and the gradients.

The formulas are in definition.py. One read of an activation gives its map; everything after that is work on the small
maps. What a gradient needs is one number per pixel, kappa, with dloss/dA = kappa sign(A) |A|^(p - 1), which is kappa A
for p = 2. That is what the kernels have; other powers are computed in plain PyTorch on every backend. All layers of an
``attention`` call are one op, so that a backend can run them in one launch.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..backend import choose, load
from ..checks import compute_dtype, grad_like
from ..library import Differentiable, build, register

UNIT_EPS = 1e-12  # of the maps' lengths


class Activation(NamedTuple):
    """What energy computes."""

    activation: Tensor  # (B, C, H, W), any strides
    power: float = 2.0  # p, 1 or more
    normalize: bool = False  # each sample's map to length 1


class AttentionPairs(NamedTuple):
    """What attention computes."""

    student: list[Tensor]  # (B, C, H, W) each, any strides
    teacher: list[Tensor]  # (B, C', H, W); constants
    layer_weights: list[float]
    reduction: str = "mean"  # over the samples; "sum", "none": (B,) or (L, B)
    layer_reduction: str = "sum"  # or "mean", "none": (L,) or (L, B)
    power: float = 2.0  # p, 1 or more
    absolute: bool = False  # the mean of |u_s - u_t| and not of its square

    def factors(self) -> list[float]:
        """What each layer's value of a sample is multiplied by. Read inside the op, where sizes are plain numbers."""
        return sample_factors(self.layer_weights, self.student[0].shape[0], self.reduction, self.layer_reduction)

    @property
    def per_layer(self) -> bool:
        return self.layer_reduction == "none"

    @property
    def per_sample(self) -> bool:
        return self.reduction == "none"


def sample_factors(layer_weights: list[float], batch: int, reduction: str, layer_reduction: str) -> list[float]:
    over = max(batch, 1) if reduction == "mean" else 1
    over *= len(layer_weights) if layer_reduction == "mean" else 1
    factors = []
    for weight in layer_weights:
        factors.append(weight / over)
    return factors


class Energy(Protocol):
    """What an implementation has: power 2."""

    def supports(self, *tensors: Tensor) -> str | None:
        """None, or the reason why these tensors cannot be computed."""

    def energies(self, activation: Tensor) -> Tensor:
        """sum_c A[c]^2 (B, H, W)."""

    def forward(self, x: AttentionPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
        """The loss, (), (L,), (B,) or (L, B), and kappa of every layer's pixels, flat (empty without need_grad)."""

    def backward(self, grad: Tensor, student: list[Tensor], kappa: Tensor) -> list[Tensor]:
        """grad_lb * kappa * A, in the layer's shape, dtype and memory format; grad is a strided (L, B)."""


def _plain() -> Any:
    """The reference, which has every power."""
    return load("energy", "reference")


# ---- one map


def _energy(*args: Any) -> tuple[Tensor, Tensor]:
    x = build(Activation, args)
    if x.power == 2:
        implementation: Energy = choose("energy", x.activation)
        m = implementation.energies(x.activation)
    else:
        m = _plain().power_sums(x.activation, x.power)
    m = m / max(x.activation.shape[1], 1)
    if not x.normalize:
        return m, m.new_empty(0)
    length = _plain().norm(m).clamp_(min=UNIT_EPS)
    return m / length, length


def _energy_backward(
    grad: Tensor, m: Tensor, length: Tensor, activation: Tensor, power: float, normalize: bool
) -> Tensor:
    if normalize:  # m is of length 1, but for one that the eps has kept short, whose norm is a constant
        inner = (grad * m).sum((1, 2), keepdim=True).masked_fill_(length <= UNIT_EPS, 0)
        grad = (grad - inner * m) / length
    kappa = (grad * (power / max(activation.shape[1], 1))).flatten()
    ones = kappa.new_ones(()).expand(1, len(activation))
    return _scaled(ones, kappa, [activation], power)[0]


def _fake_energy(*args: Any) -> tuple[Tensor, Tensor]:
    x = build(Activation, args)
    batch, _, height, width = x.activation.shape
    like = x.activation.new_empty((), dtype=compute_dtype(x.activation))
    length = like.new_empty(batch, 1, 1) if x.normalize else like.new_empty(0)
    return like.new_empty(batch, height, width), length


_energy_op = Differentiable(
    "energy",
    Activation,
    "Tensor map, Tensor length",
    _energy,
    _fake_energy,
    keep=itemgetter(0, 1, 2),
    backward=register(
        "energy_backward",
        "(Tensor grad, Tensor map, Tensor length, Tensor activation, float power, bool normalize) -> Tensor",
        _energy_backward,
        lambda grad, m, length, activation, power, normalize: grad_like(activation),
    ),
    keeps_loss=True,
)


def energy(x: Activation) -> Tensor:
    """The map (B, H, W): float32 (float64 for float64). Arguments are the caller's to check: feature_maps.py does."""
    return _energy_op(x)


# ---- the distance of pairs of maps


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    x = build(AttentionPairs, args)
    implementation: Energy = choose("energy", *x.student, *x.teacher) if x.power == 2 else _plain()
    return implementation.forward(x, args[-1])


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, need_grad = build(AttentionPairs, args), args[-1]
    like = x.student[0].new_empty((), dtype=compute_dtype(*x.student, *x.teacher))
    pixels = sum(math.prod((s.shape[0], *s.shape[2:])) for s in x.student) if need_grad else 0
    shape = [len(x.student)] * x.per_layer + [x.student[0].shape[0]] * x.per_sample
    return like.new_empty(shape), like.new_empty(pixels)


def _backward(grad: Tensor, kappa: Tensor, student: list[Tensor], reduction: str, power: float) -> list[Tensor]:
    return _scaled(of_layers_and_samples(grad, student, reduction), kappa, student, power)


def of_layers_and_samples(grad: Tensor, student: list[Tensor], reduction: str) -> Tensor:
    """The upstream gradient (), (L,), (B,) or (L, B) as (L, B)."""
    if grad.dim() == 1 and reduction != "none":  # (L,)
        grad = grad[:, None]
    return grad.expand(len(student), student[0].shape[0])


def _scaled(grad: Tensor, kappa: Tensor, student: list[Tensor], power: float) -> list[Tensor]:
    """grad kappa sign(A) |A|^(p - 1)."""
    implementation: Energy = choose("energy", *student, kappa)
    if power == 2:
        return implementation.backward(grad, student, kappa)
    slopes = [_plain().slope(s, power, kappa.dtype) for s in student]
    gradients = implementation.backward(grad, slopes, kappa)
    return [grad_like(s).copy_(g) for s, g in zip(student, gradients, strict=True)]


_attention_op = Differentiable(
    "attention",
    AttentionPairs,
    "Tensor loss, Tensor kappa",
    _forward,
    _fake,
    keep=itemgetter(0, 3, 5),
    backward=register(
        "attention_backward",
        "(Tensor grad, Tensor kappa, Tensor[] student, str reduction, float power) -> Tensor[]",
        _backward,
        lambda grad, kappa, student, reduction, power: [grad_like(s) for s in student],
    ),
)


def attention(x: AttentionPairs) -> Tensor:
    """The layers' weighted distances, reduced: float32 (float64 if an input is). Gradients flow to the student.

    Arguments are the caller's to check: at_loss.py and ft_loss.py do.
    """
    return _attention_op(x)
