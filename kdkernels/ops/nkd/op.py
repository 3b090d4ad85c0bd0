"""nkd: rows of student and teacher logits with one label each to normalised knowledge distillation, and its gradient.

The formula is in definition.py. A row's target term and its non-target term are one pass over the logits, and their
gradient another.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_label_values, compute_dtype
from ..library import Differentiable, build, register, schema

STATS = 6  # saved numbers per row


class LabelledRows(NamedTuple):
    """What nkd computes."""

    student: Tensor  # (N, C) logits, any strides
    teacher: Tensor  # (N, C); a constant
    target: Tensor  # (N,) int64
    temperature: float = 1.0
    gamma: float = 1.5  # weight of the non-target term
    ignore_index: int = -100  # rows with this label count for nothing
    reduction: str = "mean"  # over the rows that are not ignored; "sum", "none": (N,)


class NKD(Protocol):
    """What an implementation has."""

    def supports(self, *tensors: Tensor) -> str | None:
        """None, or the reason why these tensors cannot be computed."""

    def forward(self, x: LabelledRows, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the statistics of every row (6, N; empty without need_grad), and the factor () of the mean.

        stats: over the non-target classes the maximum of s, its log Z at T and at 1 relative to it, the maximum of t
        and its log Z at T; and the teacher's probability of the target at temperature 1.
        """

    def backward(self, grad: Tensor, x: LabelledRows, stats: Tensor, scale: Tensor) -> Tensor:
        """dloss/dstudent, (N, C) in the student's dtype; grad is () or (N,)."""


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = build(LabelledRows, args)
    implementation: NKD = choose("nkd", x.student, x.teacher)
    outputs = implementation.forward(x, args[-1])
    if x.target.is_cpu:
        loss = outputs[0]
        if math.isnan((loss.sum() if loss.dim() else loss).item()):
            check_label_values("target", x.target, x.student.shape[1], x.ignore_index)
    return outputs


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, need_grad = build(LabelledRows, args), args[-1]
    dtype, n = compute_dtype(x.student, x.teacher), x.student.shape[0]
    loss = x.student.new_empty((n,) if x.reduction == "none" else (), dtype=dtype)
    stats = x.student.new_empty((STATS, n) if need_grad else (0,), dtype=dtype)
    return loss, stats, x.student.new_empty((), dtype=dtype)


def _backward(grad: Tensor, stats: Tensor, scale: Tensor, *args: Any) -> Tensor:
    x = build(LabelledRows, args)
    implementation: NKD = choose("nkd", x.student, x.teacher)
    return implementation.backward(grad, x, stats, scale)


backward_op = register(
    "nkd_backward",
    f"(Tensor grad, Tensor stats, Tensor scale, {schema(LabelledRows)}) -> Tensor",
    _backward,
    lambda grad, stats, scale, student, *_: torch.empty_like(student, memory_format=torch.contiguous_format),
)


_op = Differentiable(
    "nkd",
    LabelledRows,
    "Tensor loss, Tensor stats, Tensor scale",
    _forward,
    _fake,
    keep=itemgetter(slice(0, -1)),
    backward=backward_op,
    keeps_constants=True,
)


def nkd(x: LabelledRows) -> Tensor:
    """The rows' losses, reduced: float32 (float64 if an input is). Gradients flow to the student.

    Arguments are the caller's to check: nkd_loss.py does.
    """
    return _op(x)
