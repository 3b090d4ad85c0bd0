"""angular_margin: per layer, the distance between the angular maps of student and teacher, and its gradient.

The formula is in definition.py. One read of each activation gives its channel-energy map (B, H, W); everything after
that is work on the small maps. What is saved is one number per pixel, kappa, with dloss/dA[c, n] = kappa[n] A[c, n].
All layers of a call are one op, so that a backend can run them in one launch.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..backend import choose
from ..checks import compute_dtype, grad_like
from ..energy.op import Energy, of_layers_and_samples, sample_factors
from ..library import Differentiable, build, register

ENERGY_EPS, UNIT_EPS, CLAMP = 1e-6, 1e-12, 1e-7  # of the energies' norm, of unit vectors, of the cosine


class ActivationPairs(NamedTuple):
    """What angular_margin computes."""

    student: list[Tensor]  # (B, C, H, W) each, any strides
    teacher: list[Tensor]  # (B, C', H, W); constants
    layer_weights: list[float]
    area_weights: bool = False  # times (H W)^2
    reduction: str = "mean"  # over the samples; "sum", "none": (B,) or (L, B)
    layer_reduction: str = "sum"  # or "mean", "none": (L,) or (L, B)
    margin: float = 1.35
    sharpness: float = 64.0
    local_weight: float = 0.0

    def factors(self) -> list[float]:
        """What each layer's value of a sample is multiplied by. Read inside the op, where sizes are plain numbers."""
        weights = self.layer_weights
        if self.area_weights:
            areas = (float(s.shape[2] * s.shape[3]) ** 2 for s in self.student)
            weights = [weight * area for weight, area in zip(weights, areas, strict=True)]
        return sample_factors(weights, self.student[0].shape[0], self.reduction, self.layer_reduction)

    @property
    def per_layer(self) -> bool:
        return self.layer_reduction == "none"

    @property
    def per_sample(self) -> bool:
        return self.reduction == "none"


class AngularMargin(Protocol):
    """What an implementation has."""

    def supports(self, *tensors: Tensor) -> str | None:
        """None, or the reason why these tensors cannot be computed."""

    def forward(self, x: ActivationPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
        """The loss, (), (L,), (B,) or (L, B), and kappa of every layer's pixels, flat (empty without need_grad)."""


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    x = build(ActivationPairs, args)
    implementation: AngularMargin = choose("angular_margin", *x.student, *x.teacher)
    return implementation.forward(x, args[-1])


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, need_grad = build(ActivationPairs, args), args[-1]
    like = x.student[0].new_empty((), dtype=compute_dtype(*x.student, *x.teacher))
    pixels = sum(math.prod((s.shape[0], *s.shape[2:])) for s in x.student) if need_grad else 0
    shape = [len(x.student)] * x.per_layer + [x.student[0].shape[0]] * x.per_sample
    return like.new_empty(shape), like.new_empty(pixels)


def _backward(grad: Tensor, kappa: Tensor, student: list[Tensor], reduction: str) -> list[Tensor]:
    implementation: Energy = choose("energy", *student, kappa)
    return implementation.backward(of_layers_and_samples(grad, student, reduction), student, kappa)


backward_op = register(
    "angular_margin_backward",
    "(Tensor grad, Tensor kappa, Tensor[] student, str reduction) -> Tensor[]",
    _backward,
    lambda grad, kappa, student, reduction: [grad_like(s) for s in student],
)


_op = Differentiable(
    "angular_margin",
    ActivationPairs,
    "Tensor loss, Tensor kappa",
    _forward,
    _fake,
    keep=itemgetter(0, ActivationPairs._fields.index("reduction")),
    backward=backward_op,
)


def angular_margin(x: ActivationPairs) -> Tensor:
    """The layers' weighted losses, reduced: float32 (float64 if an input is). Gradients flow to the student.

    Arguments are the caller's to check: amd_loss.py does.
    """
    return _op(x)
