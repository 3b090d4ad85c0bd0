"""What a distillation method is to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class Batch(NamedTuple):
    """What the networks see, and its labels; two of them per image where images were mixed."""

    images: Tensor
    target: Tensor
    target_mixed: Tensor | None = None
    lam: Tensor | None = None


class Outputs(NamedTuple):
    """What a network made of a batch."""

    logits: Tensor
    features: Sequence[Tensor]


class Method(nn.Module):
    """One way of teaching: what the batch becomes, which features it needs, which terms with which weights.

    A method with parameters of its own (projection heads) has them trained with the student's.
    """

    stages: ClassVar[str] = "none"  # which stages' features it needs where none are named: "none", "last" or "all"
    needs_teacher: ClassVar[bool] = True

    def prepare(self, images: Tensor, target: Tensor) -> Batch:
        """The training batch; as given, unless the method mixes or augments."""
        return Batch(images, target)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name; the loss is their sum."""
        raise NotImplementedError
