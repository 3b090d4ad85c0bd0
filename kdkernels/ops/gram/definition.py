"""gram as on a board: differentiable PyTorch, the oracle of the tests. Equations: SP (arXiv 1907.09682), eq. 1-4.

Q = reshape(A) in R^{B x D};   K = Q Q^T                                    eq. 1, 2
G[i] = K[i] / max(||K[i]||, eps)                                            eq. 3
L = sum over layer pairs of scale * ||G_t - G_s||_F^2,  scale = 1 / B^2     eq. 4
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import COSINE_EPS, LayerPairs, SPOptions


def sp_gram(x: LayerPairs) -> Tensor:
    dtype = compute_dtype(*x.student, *x.teacher)
    batch, losses = x.student[0].shape[0], []
    for student, teacher in zip(x.student, x.teacher, strict=True):
        g_s, g_t = (_normalised(gram(a.to(dtype)), x.options) for a in (student, teacher.detach()))
        losses.append((g_t - g_s).square().sum())
    layers = torch.stack([s * loss for s, loss in zip(x.options.scales(batch), losses, strict=True)])
    return layers if x.options.per_layer else layers.sum()


def gram(a: Tensor) -> Tensor:
    q = a.reshape(a.shape[0], a[0].numel() if len(a) else 0)
    return q @ q.t()


def _normalised(k: Tensor, options: SPOptions) -> Tensor:
    norm = torch.linalg.vector_norm(k, ord=2 if options.row_norm == "l2" else 1, dim=1, keepdim=True)
    g = k / norm.clamp(min=options.eps)
    # an all-zero row has no direction to normalise, so nothing goes back through that unless it is asked for
    return g if options.zero_row_grad else g.masked_fill(norm == 0, 0)


def products(a: Tensor, b: Tensor) -> Tensor:
    dtype = compute_dtype(a, b)
    return a.to(dtype) @ b.to(dtype).t()


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    dtype = compute_dtype(a, b)
    a, b = (x.to(dtype) / x.to(dtype).norm(dim=1, keepdim=True).clamp(min=COSINE_EPS) for x in (a, b))
    return a @ b.t()
