"""What a distillation method is to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
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


class Batch(NamedTuple):
    """What the networks see, and its labels: two per image if images were mixed, and the negative's for triplets."""

    images: Tensor
    target: Tensor
    target_mixed: Tensor | None = None
    lam: Tensor | None = None
    target_neg: Tensor | None = None


class Outputs(NamedTuple):
    """What a network made of a batch."""

    logits: Tensor
    features: Sequence[Tensor]


class Method(nn.Module):
    """One way of teaching: how it changes the batch, which features it needs, and its terms with their weights.

    A method with parameters of its own (heads) makes them in ``build``; they train with the student's.
    """

    stages: ClassVar[str] = "none"  # which stages' features it needs where none are named: "none", "last" or "all"
    needs_teacher: ClassVar[bool] = True
    needs_widths: ClassVar[bool] = False  # build() has to see the features' widths
    needs_classes: ClassVar[bool] = True  # ... and the logits' width; False spares it to read off a layer
    relational: ClassVar[bool] = False  # the terms compare rows, so that a batch is more than its micro-batches
    triplets: ClassVar[bool] = False  # batches are (images, target, target_neg) of training.triplets
    built: bool = False  # build() has run; set by Distillation
    group: dist.ProcessGroup | None = None  # a relational method's batch is that of the whole group

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the method's own parameters, from the widths (dimension 1) of the outputs."""

    def prepare(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        """The training batch, unchanged unless the method mixes or augments."""
        return Batch(images, target, target_neg=target_neg)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name; the loss is their sum."""
        raise NotImplementedError


def pooled(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2) if x.dim() > 2 else x
