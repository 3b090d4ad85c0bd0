"""A training under way: its parts, and all of it that a checkpoint holds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from .averaging import EMA
from .callbacks import Callback
from .distillation import Distillation
from .methods import Method
from .methods.mixed import Mixed


@dataclass
class Training:
    """What callbacks see. ``model`` is the distillation as Accelerate wraps it; ``history`` has the rows so far."""

    distillation: Distillation
    model: nn.Module
    optimizer: Any
    scheduler: LRScheduler
    accelerator: Accelerator
    train_loader: DataLoader[Any]
    test_loader: DataLoader[Any] | None
    epochs: int
    steps_per_epoch: int
    seed: int
    clip_norm: float | None = None
    ema: EMA | None = None
    callbacks: Sequence[Callback] = ()
    history: list[dict[str, float]] = field(default_factory=list)
    best: float = -1.0
    named: bool = False  # a term that drowns the others was
    stop: bool = False

    @property
    def name(self) -> str:
        return method_name(self.distillation.method)

    def averaged(self) -> AbstractContextManager[None]:
        """The student as it is tested and saved: with its averaged weights, if these are kept."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on with."""
        groups = self.optimizer.param_groups
        return {
            "method": self.name,
            "epochs": self.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "lr": [float(group.get("initial_lr", group["lr"])) for group in groups],
            "accumulate": self.accelerator.gradient_accumulation_steps,
            "mixed_precision": self.accelerator.mixed_precision,
            "clip_norm": self.clip_norm,
            "ema": self.ema and self.ema.decay,
            "seed": self.seed,
            "processes": self.accelerator.num_processes,
            "callbacks": len(self._stateful()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Asked of all processes at once, after a whole epoch."""
        return {
            "settings": self.settings(),
            "weights": self.distillation.state_dict(),
            "optimizer": self.optimizer.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
            "ema": self.ema and self.ema.state_dict(),
            "callbacks": [callback.state_dict() for callback in self._stateful()],
            "random": gather_object([self._random()]),  # of each process
            "history": self.history,
            "best": self.best,
            "stop": self.stop,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be where the training was that ``state`` is of.

        Raises:
            ValueError: it is of a training with other settings.
        """
        asked, there = self.settings(), state["settings"]
        if other := [f"{k} {there.get(k)!r} (asked: {v!r})" for k, v in asked.items() if there.get(k) != v]:
            raise ValueError(f"the run to resume has other settings: {', '.join(other)}")
        self.distillation.load_state_dict(state["weights"])
        self.optimizer.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        for callback, kept in zip(self._stateful(), state["callbacks"], strict=True):
            callback.load_state_dict(kept)
        self.history, self.best, self.stop = state["history"], state["best"], state["stop"]
        self.train_loader.iteration = len(self.history)  # Accelerate's, from which it seeds samplers
        self._set_random(state["random"][self.accelerator.process_index])

    def _stateful(self) -> list[Any]:
        return [callback for callback in self.callbacks if hasattr(callback, "load_state_dict")]

    def _random(self) -> dict[str, Any]:
        """The state of every source of randomness in this process."""
        device = self.accelerator.device
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),  # noqa: NPY002
            "torch": torch.get_rng_state(),
            "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(),
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def _set_random(self, state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if state["device"] is not None:
            torch.get_device_module(self.accelerator.device).set_rng_state(state["device"])
        for generator, kept in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(kept)

    def _generators(self) -> list[torch.Generator]:
        return _generators(self.train_loader, self.test_loader)


def method_name(method: Method) -> str:
    if isinstance(method, Mixed):
        return "+".join(method_name(part) for part in method.parts)
    return type(method).__name__.lower()


def _generators(*loaders: Any) -> list[torch.Generator]:
    """Those of loaders and of all samplers and data sets inside them, which draw the order and perhaps the items."""
    parts: list[Any] = list(loaders)
    generators: list[torch.Generator] = []
    for part in parts:  # which grows
        inner = (getattr(part, name, None) for name in ("batch_sampler", "sampler", "dataset"))
        parts += [x for x in inner if x is not None and not any(x is known for known in parts)]
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is known for known in generators):
            generators.append(generator)
    return generators
