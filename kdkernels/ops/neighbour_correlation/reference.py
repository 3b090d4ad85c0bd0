"""neighbour_correlation in plain PyTorch: the fallback. What it computes is in definition.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import NeighbourRows


def supports(*tensors: Tensor) -> str | None:
    return None


def _difference(x: NeighbourRows) -> Tensor:
    dtype = compute_dtype(x.student, x.teacher)
    return x.student.to(dtype) - x.teacher.to(dtype)


def forward(x: NeighbourRows) -> Tensor:
    delta = _difference(x).abs_()
    return (delta[:-1] * delta[1:]).sum() / x.pairs


def backward(grad: Tensor, x: NeighbourRows) -> Tensor:
    difference = _difference(x)
    delta = difference.abs()
    beside = torch.zeros_like(delta)
    beside[1:] += delta[:-1]
    beside[:-1] += delta[1:]
    return difference.sign_().mul_(beside).mul_(grad / x.pairs).to(x.student.dtype)
