"""channel_distance as on a board: differentiable PyTorch, the oracle of the tests.

X (C, M) is a sample's activation, a row per channel over M pixels; unit(x) = x / max(||x||_2, 1e-12), of rows.

    nst    U = unit(X);  K = U^T U / C;          L = ||K_s - K_t||_F^2
    ickd   G = unit(X X^T);                      L = ||G_s - G_t||_F^2 / C
    fsp    G = X Y^T / M, Y another layer's X;   L = ||G_s - G_t||_F^2 / (C C'), the mean of squares
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import UNIT_EPS, GramPairs


def channel_distance(x: GramPairs) -> Tensor:
    dtype = compute_dtype(*x.student, *x.teacher)
    teacher = [t.detach() for t in x.teacher]
    grams = zip(*([_gram(*p, x.kind) for p in x.pairs(y, dtype)] for y in (x.student, teacher)), strict=True)
    values = [factor * (s - t).square().sum((1, 2)) for (s, t), factor in zip(grams, x.factors(), strict=True)]
    loss = torch.stack(values)  # (L, B)
    loss = loss if x.per_sample else loss.sum(1)
    return loss if x.per_layer else loss.sum(0)


def _gram(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """What is compared, so scaled that the loss is its plain sum of squares. a is b but for fsp."""
    channels, pixels = (max(n, 1) for n in a.shape[1:])
    if kind == "nst":
        unit = _unit(a)
        return unit.mT @ unit / channels
    if kind == "ickd":
        return _unit(a @ a.mT) / channels**0.5
    return a @ b.mT / (pixels * (channels * max(b.shape[1], 1)) ** 0.5)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp(min=UNIT_EPS)
