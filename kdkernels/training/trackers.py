"""The accelerator that ``fit`` makes, and the trackers that hang on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import is_tensorboard_available

Trackers: TypeAlias = str | GeneralTracker | Sequence[str | GeneralTracker]


def make_accelerator(
    mixed_precision: str, accumulate: int, trackers: Trackers | None = (), folder: Path | None = None
) -> Accelerator:
    """``trackers=None``: TensorBoard in the run's folder, where there are both.

    Raises:
        ValueError: a tracker that Accelerate does not know, or whose package is not installed.
    """
    if trackers is None:
        trackers = ["tensorboard"] if folder is not None and is_tensorboard_available() else []
    asked = [trackers] if isinstance(trackers, (str, GeneralTracker)) else list(trackers)
    for tracker in asked:
        if isinstance(tracker, str) and tracker not in (known := ["all", *map(str, get_available_trackers())]):
            raise ValueError(f"trackers: {tracker!r} is not among those that are installed: {', '.join(known[1:])}")
    AcceleratorState._reset_state()  # else it refuses another precision than the first one in this process
    # without cpu=True, Accelerate makes of several CPU processes several trainings of one process each
    cpu = not torch.accelerator.is_available()
    return Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulate,
        log_with=asked or None,
        project_dir=folder,
    )


def start(accelerator: Accelerator, config: dict[str, object]) -> None:
    """Unless the user has started the trackers of an accelerator of his own."""
    if accelerator.log_with and not accelerator.trackers:
        accelerator.init_trackers("kdkernels", {k: v for k, v in config.items() if isinstance(v, (int, float, str))})


def finish(accelerator: Accelerator) -> None:
    """Not ``accelerator.end_training()``, which would end the process group too."""
    for tracker in accelerator.trackers:
        tracker.finish()
