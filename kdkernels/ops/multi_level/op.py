"""multi_level: rows of student and teacher logits at several temperatures to divergences and differences of Grams.

The formula is in definition.py. The heavy parts are PyTorch's own products, all temperatures in one, so there are no
kernels of its own: reference.py computes it on every device. The gradient is made in the forward pass, so that what is
kept for backward is one (N, C) tensor and not a Gram for each temperature.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..library import Differentiable, build, register


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


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    from .reference import forward  # which needs the record above

    return forward(build(Levels, args), args[-1])


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
