"""softmax_pearson: rows of student and teacher logits to 1 - Pearson's correlation of their probabilities, and its
gradient.

The formula is in definition.py. Forward leaves both networks' probabilities and a few factors per row and per column,
from which backward is one pass.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backend import choose
from ..checks import compute_dtype
from ..library import Differentiable, build, register


class CorrelatedRows(NamedTuple):
    """What softmax_pearson computes."""

    student: Tensor  # (N, C) logits, any strides
    teacher: Tensor  # (N, C); a constant
    temperature: float = 1.0
    beta: float = 1.0  # weight of the rows
    gamma: float = 1.0  # weight of the columns
    eps: float = 1e-8  # beside the product of the norms


class SoftmaxPearson(Protocol):
    """What an implementation has."""

    def supports(self, *tensors: Tensor) -> str | None:
        """None, or the reason why these tensors cannot be computed."""

    def forward(self, x: CorrelatedRows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The loss, and what backward needs: the probabilities a and b (N, C), and factors (3, N) and (5, C).

        dloss/da = R0 (b - R2 a - (1 - R2) / C) + R1 (a - 1 / C) + C0 (b - C2 a - C3) + C1 (a - C4), R of the row and C
        of the column, but for a number per row, which the softmax does not let through. R2 and C2 are 1 where student
        and teacher are close, so that the difference keeps its digits, else 0.
        """

    def backward(
        self,
        grad: Tensor,
        p_s: Tensor,
        p_t: Tensor,
        row_factors: Tensor,
        column_factors: Tensor,
        student: Tensor,
        temperature: float,
    ) -> Tensor:
        """dloss/dstudent, (N, C) in the student's dtype; grad is ()."""


def _forward(*args: Any) -> tuple[Tensor, ...]:
    x, need_grad = build(CorrelatedRows, args), args[-1]
    implementation: SoftmaxPearson = choose("softmax_pearson", x.student, x.teacher)
    loss, *saved = implementation.forward(x)
    return (loss, *saved) if need_grad else (loss, *(loss.new_empty(0) for _ in saved))


def _fake(*args: Any) -> tuple[Tensor, ...]:
    x, need_grad = build(CorrelatedRows, args), args[-1]
    rows, classes = x.student.shape
    shapes = ((rows, classes), (rows, classes), (3, rows), (5, classes)) if need_grad else ((0,),) * 4
    dtype = compute_dtype(x.student, x.teacher)
    return tuple(x.student.new_empty(shape, dtype=dtype) for shape in ((), *shapes))


def _backward(grad: Tensor, *args: Any) -> Tensor:
    p_s, student = args[0], args[4]
    implementation: SoftmaxPearson = choose("softmax_pearson", student, p_s)
    return implementation.backward(grad, *args)


_SAVED = "Tensor p_s, Tensor p_t, Tensor row_factors, Tensor column_factors"
backward_op = register(
    "softmax_pearson_backward",
    f"(Tensor grad, {_SAVED}, Tensor student, float temperature) -> Tensor",
    _backward,
    lambda grad, *args: torch.empty_like(args[4], memory_format=torch.contiguous_format),
)


_op = Differentiable(
    "softmax_pearson",
    CorrelatedRows,
    f"Tensor loss, {_SAVED}",
    _forward,
    _fake,
    keep=itemgetter(0, 2),
    backward=backward_op,
)


def softmax_pearson(x: CorrelatedRows) -> Tensor:
    """The weighted sum of 1 - r: float32 (float64 if an input is). Gradients flow to the student.

    Arguments are the caller's to check: dist_loss.py does.
    """
    return _op(x)
