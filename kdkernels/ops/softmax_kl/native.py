"""softmax_kl by the native library: csrc/softmax_kl.cpp and csrc/softmax_kl.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import flatten
from ..native import supports as supports
from .op import Rows

_native = torch.ops.kdkernels_native


def forward(x: Rows, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor] = _native.softmax_kl_forward.default(*flatten(x), need_grad)
    return outputs


def backward(grad: Tensor, x: Rows, stats: Tensor, scale: Tensor, in_place: bool = False) -> Tensor:
    if in_place:
        _native.softmax_kl_backward_.default(grad, *flatten(x), stats, scale)
        return x.student
    gradient: Tensor = _native.softmax_kl_backward.default(grad, *flatten(x), stats, scale)
    return gradient
