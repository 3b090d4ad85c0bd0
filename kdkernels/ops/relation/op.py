"""relation: losses of how the rows of a batch lie to each other, RKD, PKT, CC and IRG.

Each has two steps. The first is a sum over columns, so that parts of them on several ranks add up; the second is work
on B x B matrices, and gives the gradient as one more:

    measures    RKD, IRG: D[i, j] = |x_i - x_j|^2 in fp64;   PKT, CC: K[i, j] = <x_i, x_j>
    loss        of the student's and the teacher's measures, and W with dloss/dX = W X

D is made of the differences themselves, and in fp64, because angles and the gradient are small differences of its
numbers: rows that are nearly equal keep their digits, equal rows are 0 apart. The formulas are in definition.py.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backend import choose
from ..checks import compute_dtype, grad_like
from ..library import Differentiable, build, register


class RKD(NamedTuple):
    """Distances over their mean, and the angles of all triples, by smooth L1."""

    distance_weight: float
    angle_weight: float
    eps: float  # a smaller squared distance counts as that, and is a constant
    squared: bool  # squared distances in the distance term


class IRG(NamedTuple):
    """Distances over their maximum, by squares."""

    eps: float
    squared: bool


class PKT(NamedTuple):
    """Rows of cosines as probabilities, by their divergence."""

    eps: float


class CC(NamedTuple):
    """sum over p of coefficients[p] C^p of the cosines C (products with normalize=False), by squares."""

    normalize: bool
    gamma: float = 0.4
    order: int = 2
    gaussian: bool = True  # or bilinear

    @property
    def coefficients(self) -> list[float]:
        """Of the Gaussian kernel's Taylor series. Read inside the op, where gamma is a plain number."""
        if not self.gaussian:
            return [0.0, 1.0]
        first = math.exp(-2 * self.gamma)
        return [first * (2 * self.gamma) ** p / math.factorial(p) for p in range(self.order + 1)]


Options = RKD | IRG | PKT | CC
NAMES: dict[str, type] = {"rkd": RKD, "irg": IRG, "pkt": PKT, "cc": CC}
DISTANCES = ("rkd", "irg")  # the others are of products


class Relations(NamedTuple):
    """What relation computes."""

    student: Tensor  # (B, ...)
    teacher: Tensor  # (B, ...); a constant
    name: str
    numbers: list[float]  # of ``Options``, see ``pack``
    reduction: str  # "mean" over pairs (triples, for angles) or "sum"


def pack(options: Options) -> tuple[str, list[float]]:
    """Options as an op's arguments: a name and numbers."""
    return type(options).__name__.lower(), [float(field) for field in options]


def unpack(name: str, numbers: list[float]) -> Any:
    """The options, of the class that the name says."""
    if name == "cc":
        normalize, gamma, order, gaussian = numbers
        return CC(bool(normalize), gamma, int(order), bool(gaussian))
    *floats, last = numbers
    return NAMES[name](*floats, last if name == "pkt" else bool(last))


def measure_dtype(name: str, *tensors: Tensor) -> torch.dtype:
    """What measures and W are kept in."""
    wide = name in DISTANCES and tensors[0].device.type in ("cpu", "cuda", "meta")  # not every device has fp64
    return torch.float64 if wide else compute_dtype(*tensors)


class Relation(Protocol):
    """What an implementation has."""

    def supports(self, *tensors: Tensor) -> str | None:
        """None, or the reason why these tensors cannot be computed."""

    def measures(self, features: list[Tensor], name: str) -> Tensor:
        """(M, B, B): D or K of each of M (B, ...) tensors, in ``measure_dtype``."""

    def loss(self, measures: Tensor, options: Options, reduction: str, need_grad: bool) -> tuple[Tensor, Tensor]:
        """The loss () and W (B, B), of the student's and the teacher's measures (2, B, B); all in one dtype."""

    def backward(self, grad: Tensor, student: Tensor, gradient_matrix: Tensor) -> Tensor:
        """grad * W X, in the student's shape, dtype and memory format."""


def _measures(features: list[Tensor], name: str) -> Tensor:
    implementation: Relation = choose("relation", *features)
    return implementation.measures(features, name)


def _loss(measures: Tensor, name: str, numbers: list[float], reduction: str, need_grad: bool) -> tuple[Tensor, Tensor]:
    implementation: Relation = choose("relation", measures)
    return implementation.loss(measures, unpack(name, numbers), reduction, need_grad)


def _backward(grad: Tensor, gradient_matrix: Tensor, student: Tensor) -> Tensor:
    implementation: Relation = choose("relation", student, gradient_matrix)
    return implementation.backward(grad, student, gradient_matrix)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    x = build(Relations, args)
    implementation: Relation = choose("relation", x.student, x.teacher)
    measures = implementation.measures([x.student, x.teacher], x.name)
    loss, matrix = implementation.loss(measures, unpack(x.name, x.numbers), x.reduction, args[-1])
    return loss.to(compute_dtype(x.student, x.teacher)), matrix


def _outputs(measures: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    batch = measures.shape[-1]
    return measures.new_empty(()), measures.new_empty((batch, batch) if need_grad else (0,))


def _measures_fake(features: list[Tensor], name: str) -> Tensor:
    batch = features[0].shape[0]
    return features[0].new_empty((len(features), batch, batch), dtype=measure_dtype(name, *features))


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x = build(Relations, args)
    loss, matrix = _outputs(_measures_fake([x.student, x.teacher], x.name), args[-1])
    return loss.new_empty((), dtype=compute_dtype(x.student, x.teacher)), matrix


measures_op = register("relation_measures", "(Tensor[] features, str name) -> Tensor", _measures, _measures_fake)
loss_op = register(
    "relation_loss",
    "(Tensor measures, str name, float[] numbers, str reduction, bool need_grad)"
    " -> (Tensor loss, Tensor gradient_matrix)",
    _loss,
    lambda measures, name, numbers, reduction, need_grad: _outputs(measures, need_grad),
)
backward_op = register(
    "relation_backward",
    "(Tensor grad, Tensor gradient_matrix, Tensor student) -> Tensor",
    _backward,
    lambda grad, gradient_matrix, student: grad_like(student),
)
_op = Differentiable(
    "relation",
    Relations,
    "Tensor loss, Tensor gradient_matrix",
    _forward,
    _fake,
    keep=itemgetter(slice(0, 1)),
    backward=backward_op,
)


def relation(student: Tensor, teacher: Tensor, options: Options, reduction: str) -> Tensor:
    """The loss: float32 (float64 if an input is); gradients flow to the student.

    Arguments are the caller's to check.
    """
    return _op(Relations(student, teacher, *pack(options), reduction))
