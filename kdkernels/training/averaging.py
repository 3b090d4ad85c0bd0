"""An exponential moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average = decay * average + (1 - decay) * weights after every step, with the decay (1 + n) / (10 + n) at first.

    Buffers (batch norm's statistics) are averaged too, those that are no floating-point numbers are copied.

    Raises:
        ValueError: a decay outside (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema must be between 0 and 1, as 0.999, got {decay}")
        self.model, self.decay, self.updates = model, decay, 0
        self.average = {name: x.detach().clone() for name, x in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, x in self.model.state_dict().items():
            if x.is_floating_point():
                self.average[name].lerp_(x, share)
            else:
                self.average[name].copy_(x)

    def apply(self) -> None:
        """Give the model the averaged weights."""
        self.model.load_state_dict(self.average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights; afterwards it has its own again."""
        own = {name: x.detach().clone() for name, x in self.model.state_dict().items()}
        self.apply()
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, int | dict[str, Tensor]]) -> None:
        updates, average = state["updates"], state["average"]
        assert isinstance(updates, int)
        assert isinstance(average, dict)
        self.updates = updates
        for name, x in self.average.items():
            x.copy_(average[name])
