"""energy by the native library: csrc/energy.cpp and csrc/energy.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import supports as supports
from .op import AttentionPairs

_native = torch.ops.kdkernels_native


def energies(activation: Tensor) -> Tensor:
    r: Tensor = _native.energy_energies.default(activation)
    return r


def forward(x: AttentionPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
    options = x.factors(), x.absolute, x.per_layer, x.per_sample
    outputs: tuple[Tensor, Tensor] = _native.energy_forward.default(x.student, x.teacher, *options, need_grad)
    return outputs


def backward(grad: Tensor, student: list[Tensor], kappa: Tensor) -> list[Tensor]:
    gradients: list[Tensor] = _native.energy_backward.default(grad, student, kappa)
    return gradients
