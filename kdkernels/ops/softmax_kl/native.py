"""softmax_kl by the native library: csrc/softmax_kl.cpp and csrc/softmax_kl.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import flatten
from ..native import supports as supports
from . import reference
from .op import Rows

_native = torch.ops.kdkernels_native


def forward(x: Rows, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    if x.divergence != "forward" or x.standardize:
        return reference.forward(x, need_grad)
    outputs: tuple[Tensor, Tensor, Tensor] = _native.softmax_kl_forward.default(*flatten(x)[:-3], need_grad)
    return outputs


def backward(grad: Tensor, x: Rows, stats: Tensor, scale: Tensor, in_place: bool = False) -> Tensor:
    if x.divergence != "forward" or x.standardize:
        return reference.backward(grad, x, stats, scale, in_place)
    if in_place:
        return x.student.copy_(backward(grad, x, stats, scale))
    gradient: Tensor = _native.softmax_kl_backward.default(grad, *flatten(x)[:-3], stats, scale)
    return gradient
