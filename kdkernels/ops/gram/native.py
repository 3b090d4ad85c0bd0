"""gram by the native library: csrc/gram.cpp and csrc/gram.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native import supports as supports
from .op import LayerPairs, SPOptions

_native = torch.ops.kdkernels_native


def _arguments(options: SPOptions, batch: int) -> tuple[Any, ...]:
    per_layer = options.layer_reduction == "none"
    return options.row_norm, options.scales(batch), options.eps, options.zero_row_grad, per_layer


def sp_forward(x: LayerPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
    arguments = _arguments(x.options, x.student[0].shape[0])
    outputs: tuple[Tensor, Tensor] = _native.gram_sp_forward.default(x.student, x.teacher, *arguments, need_grad)
    return outputs


def sp_from_grams(grams: Tensor, options: SPOptions, need_grad: bool) -> tuple[Tensor, Tensor]:
    arguments = _arguments(options, grams.shape[-1])
    outputs: tuple[Tensor, Tensor] = _native.gram_sp_from_grams.default(grams, *arguments, need_grad)
    return outputs


def sp_backward(grad: Tensor, student: list[Tensor], gradient_matrix: Tensor) -> list[Tensor]:
    gradients: list[Tensor] = _native.gram_sp_backward.default(grad, student, gradient_matrix)
    return gradients


def grams(features: list[Tensor]) -> Tensor:
    matrices: Tensor = _native.gram_grams.default(features)
    return matrices


def products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor] = _native.gram_products.default(a, b)
    return outputs


def cosine_forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor] = _native.gram_cosine_forward.default(a, b)
    return outputs


def cosine_backward(
    grad: Tensor, a: Tensor, b: Tensor, similarity: Tensor, inverse_a: Tensor, inverse_b: Tensor
) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = _native.gram_cosine_backward.default(
        grad, a, b, similarity, inverse_a, inverse_b
    )
    return gradients
