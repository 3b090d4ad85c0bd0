"""multi_level by the native library, on the CPU: csrc/multi_level.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import supports_cpu as supports
from .op import Factor

__all__ = ["add_gradient", "level", "supports"]
_native = torch.ops.kdkernels_native


def level(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _native.multi_level_rows.default(student, teacher, temperature)
    return outputs


def add_gradient(
    total: Tensor,
    q_s: Tensor,
    difference: Tensor,
    by_batch: Tensor | None,
    by_class: Tensor | None,
    factors: tuple[Factor, Factor, Factor],
) -> None:
    _native.multi_level_gradient.default(total, q_s, difference, by_batch, by_class, *factors)
