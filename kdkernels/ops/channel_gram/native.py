"""channel_gram by the native library, on the CPU: csrc/channel_gram.cpp between PyTorch's products, for ICKD."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import supports_cpu as supports
from .op import UNIT_EPS, GramPairs
from .reference import DISTANCES, Gradients, by_parts

__all__ = ["forward", "supports"]
_native = torch.ops.kdkernels_native


def forward(x: GramPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
    return by_parts(x, need_grad, ickd if x.kind == "ickd" else DISTANCES[x.kind])


def ickd(x_s: Tensor, _: Tensor, x_t: Tensor, __: Tensor) -> tuple[Tensor, Gradients]:
    """||G_s - G_t||^2 / C of the unit rows G of K = X X^T."""
    k_s, k_t = torch.bmm(x_s, x_s.mT), torch.bmm(x_t, x_t.mT)
    values, of_student, of_teacher = _native.channel_gram_ickd_rows.default(k_s, k_t, UNIT_EPS)

    def gradients(factor: float, to: Tensor, _: Tensor) -> None:
        h = _native.channel_gram_ickd_matrix.default(k_s, k_t, of_student, of_teacher, factor)
        torch.bmm(h, x_s, out=to)

    return values.sum(1), gradients
