"""relation by the native library, on CPUs: csrc/relation.cpp. GPUs run the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .op import CC, DISTANCES, IRG, PKT, RKD, Options

_native = torch.ops.kdkernels_native


def supports(*tensors: Tensor) -> str | None:
    if not all(x.is_cpu for x in tensors):
        return "the native kernels of relation are for CPUs alone"
    return native.supports(*tensors)


def measures(features: list[Tensor], name: str) -> Tensor:
    matrices: Tensor
    if name in DISTANCES:
        # angles are small differences of these; for IRG differences of fp32 numbers summed in fp32 are as good
        matrices = _native.relation_distances.default(features, name == "rkd")
    else:
        matrices = _native.gram_grams.default(features)
    return matrices


def loss(measures: Tensor, options: Options, reduction: str, need_grad: bool) -> tuple[Tensor, Tensor]:
    last = reduction == "mean", need_grad
    outputs: tuple[Tensor, Tensor]
    match options:
        case RKD():
            outputs = _native.relation_rkd.default(measures, *options, *last)
        case IRG():
            outputs = _native.relation_irg.default(measures, *options, *last)
        case PKT():
            outputs = _native.relation_pkt.default(measures, *options, *last)
        case CC():
            outputs = _native.relation_cc.default(measures, options.coefficients, options.normalize, *last)
    return outputs


def backward(grad: Tensor, student: Tensor, gradient_matrix: Tensor) -> Tensor:
    gradients: list[Tensor] = _native.gram_sp_backward.default(grad, [student], gradient_matrix[None])
    return gradients[0]
