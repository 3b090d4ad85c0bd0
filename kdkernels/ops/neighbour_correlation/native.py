"""neighbour_correlation by the native library, on the CPU: csrc/neighbour_correlation.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import supports_cpu as supports
from .op import NeighbourRows

__all__ = ["backward", "forward", "supports"]
_native = torch.ops.kdkernels_native


def forward(x: NeighbourRows) -> Tensor:
    loss: Tensor = _native.neighbour_correlation_forward.default(*x)
    return loss


def backward(grad: Tensor, x: NeighbourRows) -> Tensor:
    gradient: Tensor = _native.neighbour_correlation_backward.default(grad, *x)
    return gradient
