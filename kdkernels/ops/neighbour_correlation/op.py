"""neighbour_correlation: rows of student and teacher features to how much rows that follow each other are off at the
same places, and its gradient.

The formula is in definition.py. Nothing is saved but the features: each pass reads them once.
"""

from __future__ import annotations

from operator import itemgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..backend import choose
from ..checks import compute_dtype
from ..library import Differentiable, register


class NeighbourRows(NamedTuple):
    """What neighbour_correlation computes."""

    student: Tensor  # (N, d), any strides
    teacher: Tensor  # (N, d); a constant

    @property
    def pairs(self) -> int:
        """What the sum is divided by."""
        return max(self.student.shape[0] - 1, 1)


class NeighbourCorrelation(Protocol):
    """What an implementation has."""

    def supports(self, *tensors: Tensor) -> str | None:
        """None, or the reason why these tensors cannot be computed."""

    def forward(self, x: NeighbourRows) -> Tensor:
        """The loss ()."""

    def backward(self, grad: Tensor, x: NeighbourRows) -> Tensor:
        """dloss/dstudent, (N, d) in the student's dtype; grad is (). As PyTorch's, the slope of |0| and |NaN| is 0."""


def _forward(student: Tensor, teacher: Tensor, need_grad: bool) -> Tensor:
    implementation: NeighbourCorrelation = choose("neighbour_correlation", student, teacher)
    return implementation.forward(NeighbourRows(student, teacher))


def _backward(grad: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    implementation: NeighbourCorrelation = choose("neighbour_correlation", student, teacher)
    return implementation.backward(grad, NeighbourRows(student, teacher))


backward_op = register(
    "neighbour_correlation_backward",
    "(Tensor grad, Tensor student, Tensor teacher) -> Tensor",
    _backward,
    lambda grad, student, teacher: torch.empty_like(student, memory_format=torch.contiguous_format),
)
_op = Differentiable(
    "neighbour_correlation",
    NeighbourRows,
    "Tensor loss",
    _forward,
    lambda student, teacher, need_grad: student.new_empty((), dtype=compute_dtype(student, teacher)),
    keep=itemgetter(0, 1),
    backward=backward_op,
    keeps_constants=True,
)


def neighbour_correlation(x: NeighbourRows) -> Tensor:
    """The mean over neighbours: float32 (float64 if an input is). Gradients flow to the student.

    Arguments are the caller's to check: cc_loss.py does.
    """
    return _op(x)
