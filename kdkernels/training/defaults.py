"""The optimizer and the learning rate that training starts from, wherever the loop is."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def default_optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """SGD, Nesterov momentum 0.9, weight decay 5e-4, over those parameters that are trained."""
    trained = (p for p in parameters if p.requires_grad)
    return torch.optim.SGD(trained, lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def default_scheduler(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """A linear warm-up over the first 5 % of the steps, under a cosine to zero."""
    warmup = max(1.0, 0.05 * steps)
    return LambdaLR(optimizer, lambda i: min(1, (i + 1) / warmup) * (1 + math.cos(math.pi * min(1, i / steps))) / 2)
