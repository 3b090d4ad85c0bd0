"""What a distillation method is to the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import ClassVar, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from ...ops.checks import check_weight


def check_share(name: str, value: float) -> None:
    """A weight in [0, 1]; another term gets 1 - value."""
    caller, _, option = name.partition(": ")
    check_weight(caller, **{option: value})
    if value > 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


WARMUP = 0.2  # of methods that compare features: at full weight, their first gradients exceed cross entropy's by far
Schedule = Callable[[float], float]  # the share of the training that is done, 0 to 1, to a weight


def check_scheduled(method: Method, option: str, value: float) -> float:
    check_weight(type(method).__name__, **{option: value})
    return value


class Outputs(NamedTuple):
    """What a network made of a batch."""

    logits: Tensor
    features: Sequence[Tensor]


class Batch(NamedTuple):
    """What the networks see, and its labels: two per image if images were mixed, and the negative's for triplets.

    ``teacher`` is what the teacher makes of it, where that is known.
    """

    images: Tensor
    target: Tensor
    target_mixed: Tensor | None = None
    lam: Tensor | None = None
    target_neg: Tensor | None = None
    teacher: Outputs | None = None


class Method(nn.Module):
    """One way of teaching: how it changes the batch, which features it needs, and its terms with their weights.

    A method with parameters of its own (heads) makes them in ``build``; they train with the student's.
    """

    stages: ClassVar[str] = "none"  # which stages' features it needs where none are named: "none", "last" or "all"
    maps: ClassVar[bool] = False  # its features must be maps (N, C, H, W)
    most_layers: ClassVar[int | None] = None  # of a transformer's, evenly spread, where none are named
    needs_teacher: ClassVar[bool] = True
    needs_widths: ClassVar[bool] = False  # build() has to see the features' widths
    needs_classes: ClassVar[bool] = True  # ... and the logits' width; False spares it to read off a layer
    includes: ClassVar[tuple[str, ...]] = ()  # terms that are inside its own, which a mixture does not add again
    scales: ClassVar[dict[str, str]] = {}  # the option that scales a term, where it is not one called weight
    relational: ClassVar[bool] = False  # the terms compare rows, so that a batch is more than its micro-batches
    triplets: ClassVar[bool] = False  # batches are (images, target, target_neg) of training.triplets
    weight: float = 1.0  # of its own term, where it has one weight
    named_layers: bool = False  # the user named the layers; set by Distillation
    built: bool = False  # build() has run; set by Distillation
    group: dist.ProcessGroup | None = None  # rows that are compared, and batch norms of heads, are of the whole group

    def __init__(self, warmup: float = 0.0) -> None:
        """``warmup`` is the share of the training in which the method's own terms grow to their weights."""
        super().__init__()
        check_share(f"{type(self).__name__}: warmup", warmup)
        self.schedules: dict[str, Schedule] = {}
        self.warmup, self.grown = warmup, 1.0  # whole, unless somebody says how far the training is

    def schedule(self, share: float) -> None:
        """Set the options that are schedules to their values after that share of the training."""
        self.grown = min(1.0, share / self.warmup) if self.warmup else 1.0
        for option, value in self.schedules.items():
            self.set_option(option, check_scheduled(self, option, value(share)))

    def weighted(self, loss: Tensor) -> Tensor:
        """The method's own term, at its weight of this step."""
        return self.grown * self.weight * loss

    def set_option(self, option: str, value: float) -> None:
        """Change a weight; a method that keeps its weights elsewhere than in attributes overrides this."""
        setattr(self, option, value)

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the method's own parameters, from the widths (dimension 1) of the outputs."""

    def widths(self, student: Outputs, teacher: Outputs | None) -> tuple[list[int], list[int]]:
        """The widths that ``build`` depends on, the student's and the teacher's."""
        logits = [student.logits][: self.needs_classes]
        features = [] if teacher is None else teacher.features
        return [x.shape[1] for x in (*student.features, *logits)], [x.shape[1] for x in features]

    def scaled_by(self, term: str) -> str:
        """The option that makes a term larger or smaller, in words."""
        options = signature(type(self)).parameters
        weights = [name for name in options if name == "weight"] or [n for n in options if n.endswith("_weight")]
        return f"{self.scales.get(term, ', '.join(weights) or 'weight')}= of {type(self).__name__}"

    @property
    def fixed_views(self) -> int:
        """How many images ``prepare`` makes of each, the same ones each time; 0 where it draws or mixes them."""
        return int(type(self).prepare is Method.prepare and not self.triplets)

    def own_rows(self, images: int) -> slice:
        """Which of the rows that ``prepare`` made are the images as they came; a mixture's other methods see them."""
        return slice(images)

    def prepare(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        """The training batch, unchanged unless the method mixes or augments."""
        return Batch(images, target, target_neg=target_neg)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name; the loss is their sum."""
        raise NotImplementedError
