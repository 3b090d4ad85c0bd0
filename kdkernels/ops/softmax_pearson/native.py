"""softmax_pearson by the native library, on the CPU: csrc/softmax_pearson.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import supports_cpu as supports
from .op import CorrelatedRows

__all__ = ["backward", "forward", "supports"]
_native = torch.ops.kdkernels_native


def forward(x: CorrelatedRows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _native.softmax_pearson_forward.default(*x)
    return outputs


def backward(
    grad: Tensor,
    p_s: Tensor,
    p_t: Tensor,
    row_factors: Tensor,
    column_factors: Tensor,
    student: Tensor,
    temperature: float,
) -> Tensor:
    saved = p_s, p_t, row_factors, column_factors
    gradient: Tensor = _native.softmax_pearson_backward.default(grad, *saved, student, temperature)
    return gradient
