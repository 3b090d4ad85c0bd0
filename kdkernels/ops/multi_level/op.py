"""multi_level: rows of student and teacher logits at several temperatures to divergences and differences of Grams.

The formula is in definition.py. With d = q_t - q_s and m = (q_t + q_s) / 2 a difference of Grams is X + X', X = d m',
and its squared norm has the gradient -4 (X + X') q_s: two products instead of four, and nothing cancels where the
networks are close. The products are PyTorch's; what is before and behind them is the backend's. The gradient is made in
the forward pass, so that only one (N, C) tensor is kept for backward, and no Gram.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backend import choose
from ..checks import compute_dtype
from ..library import Differentiable, build, register

Factor = float | Tensor  # a tensor () where reading its value would stall an accelerator


class Levels(NamedTuple):
    """What multi_level computes."""

    student: Tensor  # (N, C) logits, any strides
    teacher: Tensor  # (N, C); a constant
    temperatures: list[float]
    weights: list[float]  # of each temperature's T^2 KL
    masked_weight: float = 0.0  # of each temperature's T^2 KL times the share of rows that are unsure
    batch_weight: float = 0.0  # of the (N, N) Grams' difference
    class_weight: float = 0.0  # of the (C, C) Grams' difference
    quantile: float = 0.5  # rows, and classes, are unsure up to this quantile of the teacher's confidence


class MultiLevel(Protocol):
    """What an implementation has."""

    def supports(self, *tensors: Tensor) -> str | None:
        """None, or the reason why these tensors cannot be computed."""

    def level(self, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_s, d and m (N, C), and the sum over rows of KL(q_t || q_s), ()."""

    def add_gradient(
        self,
        total: Tensor,
        q_s: Tensor,
        difference: Tensor,
        by_batch: Tensor | None,
        by_class: Tensor | None,
        factors: tuple[Factor, Factor, Factor],
    ) -> None:
        """total += f0 d, and f1 by_batch + f2 by_class through the softmax, with the three factors."""


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    x, need_grad = build(Levels, args), args[-1]
    implementation: MultiLevel = choose("multi_level", x.student, x.teacher)
    dtype, (rows, classes) = compute_dtype(x.student, x.teacher), x.student.shape
    loss = x.student.new_zeros((), dtype=dtype)
    gradient = x.student.new_zeros((rows, classes) if need_grad else (0,), dtype=dtype)
    if rows == 0:
        return loss, gradient
    unsure_rows, unsure_classes = _shares(x, dtype)
    batch, of_class = x.batch_weight * unsure_rows / rows, x.class_weight * unsure_classes / classes
    for temperature, weight in zip(x.temperatures, x.weights, strict=True):
        q_s, d, middle, divergence = implementation.level(x.student, x.teacher, temperature)
        kd = (weight + x.masked_weight * unsure_rows) * (temperature / rows)
        loss = loss + divergence * (temperature * kd)
        by_batch = by_class = None
        if x.batch_weight:
            gram = _symmetric(d.mm(middle.t()))
            loss, by_batch = loss + _squared_norm(gram) * batch, gram.mm(q_s) if need_grad else None
        if x.class_weight:
            gram = _symmetric(d.t().mm(middle))
            loss, by_class = loss + _squared_norm(gram) * of_class, q_s.mm(gram) if need_grad else None
        if need_grad:
            factors = -kd, -4 / temperature * batch, -4 / temperature * of_class
            implementation.add_gradient(gradient, q_s, d, by_batch, by_class, factors)
    return loss, gradient


def _shares(x: Levels, dtype: torch.dtype) -> tuple[Factor, Factor]:
    """Of the rows, and of the classes, that are no surer than the quantile."""
    if not (x.masked_weight or x.batch_weight or x.class_weight):
        return 1.0, 1.0
    p = x.teacher.to(dtype).softmax(1)

    def share(confidence: Tensor) -> Factor:
        at_most = confidence.kthvalue(int(x.quantile * (len(confidence) - 1)) + 1).values
        unsure = (confidence <= at_most).to(dtype).mean()
        return unsure.item() if unsure.is_cpu else unsure

    return share(p.amax(1)), share(p.sum(0))


def _symmetric(half: Tensor) -> Tensor:
    return half + half.t()


def _squared_norm(gram: Tensor) -> Tensor:
    """By rows, whose own sums are short enough for fp32."""
    return torch.linalg.vector_norm(gram, dim=1).square().sum()


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, need_grad = build(Levels, args), args[-1]
    dtype = compute_dtype(x.student, x.teacher)
    gradient = x.student.new_empty(x.student.shape if need_grad else (0,), dtype=dtype)
    return x.student.new_empty((), dtype=dtype), gradient


backward_op = register(
    "multi_level_backward",
    "(Tensor grad, Tensor gradient, Tensor student) -> Tensor",
    lambda grad, gradient, student: (grad * gradient).to(student.dtype),
    lambda grad, gradient, student: torch.empty_like(student, memory_format=torch.contiguous_format),
)


_op = Differentiable(
    "multi_level",
    Levels,
    "Tensor loss, Tensor gradient",
    _forward,
    _fake,
    keep=itemgetter(slice(0, 1)),
    backward=backward_op,
)


def multi_level(x: Levels) -> Tensor:
    """The weighted sum over the temperatures: float32 (float64 if an input is). Gradients flow to the student.

    Arguments are the caller's to check: mlld_loss.py does.
    """
    return _op(x)
