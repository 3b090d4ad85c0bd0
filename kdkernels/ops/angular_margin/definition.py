"""angular_margin as on a board: differentiable PyTorch, the oracle of the tests. Equations: arXiv 2302.14130, eq. 7-12.

Per sample, over the pixels, for student and teacher:

    r = sum_c A[c]^2;   q = r / (||r||_2 + 1e-6);   w = 1 - q        the positive and the negative map
    u = cos(m acos q);  G = log(e^{su} / (e^{su} + e^{sw})) = -softplus(s (w - u))
    L = (1/3) [mse(G^) + mse(u^) + mse(w^)],  v^ = v / ||v||_2       mean over the pixels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import compute_dtype
from .op import CLAMP, ENERGY_EPS, UNIT_EPS, ActivationPairs


def angular_margin(x: ActivationPairs) -> Tensor:
    dtype = compute_dtype(*x.student, *x.teacher)
    values = []
    for student, teacher, factor in zip(x.student, x.teacher, x.factors(), strict=True):
        maps_s, maps_t = (_maps(a.to(dtype), x.margin, x.sharpness) for a in (student, teacher.detach()))
        values.append(factor * _distances(maps_s, maps_t, x.local_weight))
    loss = torch.stack(values)  # (L, B)
    loss = loss if x.per_sample else loss.sum(1)
    return loss if x.per_layer else loss.sum(0)


def _maps(a: Tensor, margin: float, sharpness: float) -> Tensor:
    """G, u and w of (B, C, H, W) activations, stacked: (3, B, H, W)."""
    r = a.square().sum(1)
    norm = torch.linalg.vector_norm(r, dim=(1, 2), keepdim=True)
    q = r / (norm + ENERGY_EPS)
    w = (norm - r + ENERGY_EPS) / (norm + ENERGY_EPS)  # 1 - q, which rounds to 0 where one pixel has all the energy
    u = q.clamp(-1 + CLAMP, 1 - CLAMP)
    if margin != 1:  # of a dead map the rounding of cos(acos(0)), 6e-17, would be a unit vector's 6e-5
        u = (margin * u.acos()).cos()
    return torch.stack((-F.softplus(sharpness * (w - u), threshold=1e9), u, w))


def _distances(maps_s: Tensor, maps_t: Tensor, local_weight: float) -> Tensor:
    """Each sample's L (B,): of the whole map, and with a local weight also the mean over its four quadrants."""
    loss = (1 - local_weight) * _distance(maps_s, maps_t)
    if local_weight:
        h, w = maps_s.shape[2] // 2, maps_s.shape[3] // 2
        for rows in (slice(None, h), slice(h, None)):
            for columns in (slice(None, w), slice(w, None)):
                quadrant = (..., rows, columns)
                loss = loss + local_weight / 4 * _distance(maps_s[quadrant], maps_t[quadrant])
    return loss


def _distance(maps_s: Tensor, maps_t: Tensor) -> Tensor:
    units = []
    for maps in (maps_s, maps_t):
        norm = torch.linalg.vector_norm(maps, dim=(2, 3), keepdim=True)
        units.append(maps / norm.clamp(min=UNIT_EPS))
    pixels = max(maps_s.shape[2] * maps_s.shape[3], 1)
    return (units[0] - units[1]).square().sum((0, 2, 3)) / (3 * pixels)
