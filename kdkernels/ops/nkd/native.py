"""nkd by the native library, on the CPU: csrc/nkd.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import supports_cpu as supports
from .op import LabelledRows

__all__ = ["backward", "forward", "supports"]
_native = torch.ops.kdkernels_native


def forward(x: LabelledRows, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor] = _native.nkd_forward.default(*x, need_grad)
    return outputs


def backward(grad: Tensor, x: LabelledRows, stats: Tensor, scale: Tensor) -> Tensor:
    gradient: Tensor = _native.nkd_backward.default(grad, *x, stats, scale)
    return gradient
