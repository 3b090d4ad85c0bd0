"""angular_margin by the native library: csrc/angular_margin.cpp and csrc/angular_margin.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import supports as supports
from .op import ActivationPairs

_native = torch.ops.kdkernels_native


def forward(x: ActivationPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
    reductions = x.layer_reduction == "none", x.reduction == "none"  # two calls less
    options = x.factors(), x.margin, x.sharpness, x.local_weight, *reductions
    outputs: tuple[Tensor, Tensor] = _native.angular_margin_forward.default(x.student, x.teacher, *options, need_grad)
    return outputs
