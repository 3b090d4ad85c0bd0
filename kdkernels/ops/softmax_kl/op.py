"""softmax_kl: rows of student and teacher logits to the weighted sum of four terms per row, and its gradient.

The formula is in definition.py. The terms' weights are inside the op, so that a whole loss is one pass over the logits
and its gradient another.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backend import choose
from ..checks import compute_dtype
from ..library import Differentiable, build, register, schema

STATS = 5  # saved numbers per row: two maxima and three log-sums
NO_LABEL = -(2**62)  # an ignore_index that ignores nothing: -100 is out of range like any other
STANDARD_EPS = 1e-7  # what standardize adds to a row's standard deviation


class Labels(NamedTuple):
    """Up to two labels per row: y = lam onehot(target) + (1 - lam) onehot(mixed). Or a dense y."""

    target: Tensor | None = None  # (N,) int64, or dense (N, C) floating-point; every term but KL needs it
    mixed: Tensor | None = None  # (N,) int64, with lam
    lam: Tensor | None = None  # () or (N,)
    ignore_index: int = -100  # rows with this label in either place count for nothing
    smoothing: float = 0.0  # e: CE is with (1 - e) y + e / C

    @property
    def dense(self) -> bool:
        return self.target is not None and self.target.is_floating_point()


class Terms(NamedTuple):
    """The weights of a row's terms."""

    ce: float = 0.0  # cross entropy with y, at temperature 1
    kl: float = 0.0  # the divergence at the temperature: KL(teacher || student)
    target_kl: float = 0.0  # that one's part over {the labelled classes, all others together}
    non_target_kl: float = 0.0  # the KL among the classes that are not labelled, renormalised

    @property
    def decoupled(self) -> bool:
        return self.target_kl != 0 or self.non_target_kl != 0

    @property
    def soft(self) -> bool:
        """Whether the teacher is needed."""
        return self.kl != 0 or self.decoupled


class Rows(NamedTuple):
    """What softmax_kl computes: the terms of every row, reduced."""

    student: Tensor  # (N, C) logits, any strides
    teacher: Tensor  # (N, C); a constant
    labels: Labels = Labels()
    terms: Terms = Terms(kl=1.0)
    temperature: float = 1.0
    reduction: str = "mean"  # over the rows that are not ignored; "sum", "none": (N,)
    divergence: str = "forward"  # "reverse", "jsd", "skew", "skew_reverse", which the decoupled terms exclude
    beta: float = 0.5  # of the last three, in (0, 1)
    standardize: bool = False  # logits of mean 0 and standard deviation 1 in all terms but CE

    @property
    def stats(self) -> int:
        """How many numbers are saved per row."""
        return STATS + 4 * self.terms.decoupled + (self.divergence != "forward") + 4 * self.standardize


class SoftmaxKL(Protocol):
    """What an implementation has."""

    def supports(self, *tensors: Tensor) -> str | None:
        """None, or the reason why these tensors cannot be computed."""

    def forward(self, x: Rows, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the statistics of every row (x.stats, N; empty without need_grad), and the factor () of the mean.

        stats: the maxima of s and t; log Z of p_s and of q_s, relative to the maximum; and log(Z of q_t / Z of q_s),
        which keeps its digits where the networks are close.
        With decoupled terms, of the non-target classes: the maxima of s and t; log Z of s, relative to that; and the
        log of Z of q_t over Z of q_s. The logarithm of an empty sum is -inf, and counts as 0 in the last where the
        other is not.
        Unless the divergence is "forward": the mean under q_s of its slopes (see reference_divergences.py).
        With standardize, z' being the standardised s: the inverse standard deviations of s and t; the mean of z'
        relative to its maximum; and how much of z' is to be taken from dL/dz' on its way to s.
        """

    def backward(self, grad: Tensor, x: Rows, stats: Tensor, scale: Tensor, in_place: bool = False) -> Tensor:
        """dloss/dstudent, (N, C) in the student's dtype; grad is () or (N,).

        Given stats it is elementwise in the two logits, but for decoupled terms and the sum of a dense target.
        in_place: it is written over x.student, which is contiguous.
        """


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = build(Rows, args)
    implementation: SoftmaxKL = choose("softmax_kl", x.student, x.teacher)
    outputs = implementation.forward(x, args[-1])
    if x.labels.target is not None and x.labels.target.is_cpu:
        loss = outputs[0]
        if math.isnan((loss.sum() if loss.dim() else loss).item()):
            _check_values(x.labels, x.student.shape[1])
    return outputs


def _check_values(labels: Labels, classes: int) -> None:
    """Raise for a label out of range, whose row is NaN. On the CPU alone: reading values would stall an accelerator."""
    for name, label in (("target", labels.target), ("target_mixed", labels.mixed)):
        if label is None or label.is_floating_point():
            continue
        bad = label[(label != labels.ignore_index) & ((label < 0) | (label >= classes))]
        if bad.numel():
            ignored = "" if labels.ignore_index == NO_LABEL else f", and {labels.ignore_index} to ignore"
            raise ValueError(f"{name} has label {int(bad[0])}; valid are 0..{classes - 1}{ignored}")


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, need_grad = build(Rows, args), args[-1]
    dtype, n = compute_dtype(x.student, x.teacher), x.student.shape[0]
    stats = (x.stats, n) if need_grad else (0,)
    loss = x.student.new_empty((n,) if x.reduction == "none" else (), dtype=dtype)
    return loss, x.student.new_empty(stats, dtype=dtype), x.student.new_empty((), dtype=dtype)


def _backward(grad: Tensor, stats: Tensor, scale: Tensor, *args: Any) -> Tensor:
    x = build(Rows, args)
    implementation: SoftmaxKL = choose("softmax_kl", x.student, x.teacher)
    return implementation.backward(grad, x, stats, scale)


backward_op = register(
    "softmax_kl_backward",
    f"(Tensor grad, Tensor stats, Tensor scale, {schema(Rows)}) -> Tensor",
    _backward,
    lambda grad, stats, scale, student, *_: torch.empty_like(student, memory_format=torch.contiguous_format),
)


_op = Differentiable(
    "softmax_kl",
    Rows,
    "Tensor loss, Tensor stats, Tensor scale",
    _forward,
    _fake,
    keep=itemgetter(slice(0, -1)),
    backward=backward_op,
    keeps_constants=True,
)


def softmax_kl(x: Rows) -> Tensor:
    """The rows' weighted terms, reduced: float32 (float64 if an input is). Gradients flow to the student.

    Arguments are the caller's to check: kd_loss.py and stkd_loss.py do.
    """
    return _op(x)
