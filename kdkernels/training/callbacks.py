"""What a user adds to ``fit``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .state import Training


class Callback:
    """Called by ``fit`` in every process; ``training.stop = True`` ends the training after its epoch.

    One that has ``state_dict()`` and ``load_state_dict()`` is kept in checkpoints.
    """

    def on_step(self, training: Training, step: int, values: Mapping[str, float]) -> None:
        """After an optimizer step, counted from 1, with loss and terms of its last micro-batch."""

    def on_epoch(self, training: Training, row: dict[str, float]) -> None:
        """After an epoch and its test, before anything is saved; what it adds to ``row`` gets into the metrics."""
