"""angular_margin in plain PyTorch, made fast: the fallback. What it computes is in definition.py.

Notation, per sample, over the N = H W pixels: r channel energy, R its norm, q = r / (R + eps) the positive and w = 1
- q the negative map, u = cos(m acos q), G = -softplus(s (w - u)). Gradients are closed forms; differences of unit
vectors are formed before they are squared, so that nothing cancels when the student is close to its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import compute_dtype
from ..energy.reference import norm as energy_norm
from ..energy.reference import power_sums
from .op import CLAMP, ENERGY_EPS, UNIT_EPS, ActivationPairs


def supports(*tensors: Tensor) -> str | None:
    return None


def regions(height: int, width: int, local_weight: float) -> Iterator[tuple[slice, slice, float]]:
    """(rows, columns, weight) of the whole map and, with a local weight, of its four quadrants."""
    yield slice(None), slice(None), 1 - local_weight
    if local_weight:
        h, w = height // 2, width // 2
        for top in (slice(None, h), slice(h, None)):
            for left in (slice(None, w), slice(w, None)):
                yield top, left, local_weight / 4


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True)


def _maps(r: Tensor, norm: Tensor, q: Tensor, margin: float, sharpness: float) -> Tensor:
    """G, u and w, stacked. w = 1 - q without its rounding: where one pixel has all the energy it is eps / (R + eps).

    u is cos(m (pi/2 - asin q)), as acos has no digits left where q is small: with a margin of 1 their rounding would be
    made a unit vector.
    """
    w = (norm - r).add_(ENERGY_EPS).div_(norm + ENERGY_EPS)
    angle = margin * q.clamp(max=1 - CLAMP).asin_()
    at_0 = 0.0 if margin == 1 else math.cos(margin * math.pi / 2)
    u = at_0 * angle.cos() + math.sin(margin * math.pi / 2) * angle.sin()
    return torch.stack((-F.softplus(sharpness * (w - u)), u, w))


def _slopes(q: Tensor, theta: Tensor, u: Tensor, w: Tensor, margin: float, sharpness: float) -> Tensor:
    """dG/dq, du/dq and dw/dq, stacked."""
    du = (margin * torch.sin(margin * theta)).div_(torch.sin(theta)).masked_fill_(q.abs() > 1 - CLAMP, 0)
    return torch.stack((sharpness * torch.sigmoid(sharpness * (w - u)) * (du + 1), du, torch.full_like(du, -1)))


def forward(x: ActivationPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(*x.student, *x.teacher)
    losses, kappas = [], []
    for s, t, factor in zip(x.student, x.teacher, x.factors(), strict=True):
        if s.shape[0] * s.shape[2] * s.shape[3]:
            loss, kappa = _layer(s, t, factor, x, dtype, need_grad)
            kappas.append(kappa)
        else:
            loss = torch.zeros(s.shape[0], dtype=dtype, device=s.device)
        losses.append(loss)
    total = torch.stack(losses)  # (L, B)
    total = total if x.per_sample else total.sum(1)
    total = total if x.per_layer else total.sum(0)
    return total, torch.cat(kappas) if kappas and need_grad else total.new_empty(0)


def _layer(
    s: Tensor, t: Tensor, factor: float, x: ActivationPairs, dtype: torch.dtype, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """One layer's losses (B,) and kappa (B H W,)."""
    _, _, height, width = s.shape
    r = torch.stack([power_sums(a, 2.0, dtype) for a in (s, t)])  # (2, B, H, W): student, teacher
    norm = energy_norm(r)
    q = r / (norm + ENERGY_EPS)
    theta = q.clamp(-1 + CLAMP, 1 - CLAMP).acos_()
    maps = _maps(r, norm, q, x.margin, x.sharpness)  # (3, 2, B, H, W)
    slopes = _slopes(q[0], theta[0], maps[1, 0], maps[2, 0], x.margin, x.sharpness) if need_grad else None
    loss, h = torch.zeros(len(s), dtype=dtype, device=s.device), torch.zeros_like(q[0])
    for top, left, weight in regions(height, width, x.local_weight):
        v = maps[..., top, left]
        c = factor * weight / (3 * v[0, 0, 0].numel())
        e, dv = _region(v, c)
        loss += c * e.sum((0, 2, 3))
        if slopes is not None:
            h[..., top, left] += dv.mul_(slopes[..., top, left]).sum(0)
    if not need_grad:
        return loss, loss
    direction = torch.where(norm[0] > 0, r[0] / norm[0], 0)  # r / R, and 0 on a dead map
    inner = (h * q[0]).sum((-2, -1), keepdim=True)
    return loss, (2 * (h - inner * direction) / (norm[0] + ENERGY_EPS)).flatten()


def _region(v: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Of one region's maps (3, 2, B, h, w): e = |D|^2 of the unit vectors' difference D, and d(c e)/dv_s."""
    norms = _norm(v)
    length = norms.clamp(min=UNIT_EPS)
    unit = v / length
    difference = unit[:, 0] - unit[:, 1]
    e = difference.square().sum((-2, -1), keepdim=True)
    # <x, D>: e / 2 for unit vectors. Under the clamp (a region of one bright pixel) a vector is shorter than 1, and the
    # student's norm is a constant
    of_1 = (norms / length).square()
    inner = ((e + of_1[:, 0] - of_1[:, 1]) / 2).masked_fill_(norms[:, 0] < UNIT_EPS, 0)
    return e, difference.sub_(inner * unit[:, 0]).mul_(2 * c / length[:, 0])
