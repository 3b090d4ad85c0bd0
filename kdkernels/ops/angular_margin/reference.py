"""Angular margin maps in plain PyTorch: the definition, the fallback and the oracle of the tests.

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

from ..checks import compute_dtype, grad_like

ENERGY_EPS, UNIT_EPS, CLAMP = 1e-6, 1e-12, 1e-7
CACHED = 1 << 18  # numbers that stay in a core's cache


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


def _energy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """r (B, H, W). On a CPU in parts, to keep the squares in the cache; a fused vector_norm is five times slower."""
    samples = CACHED // max(1, x[0].numel()) if x.device.type == "cpu" else len(x)
    return torch.cat([part.to(dtype).square().sum(1) for part in x.split(max(1, samples))])


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True)


def _energy_norm(r: Tensor) -> Tensor:
    """R, by way of r / max r: squares of large energies overflow fp32."""
    top = r.amax((-2, -1), keepdim=True).clamp_(min=torch.finfo(r.dtype).tiny)
    return _norm(r / top).mul_(top)


def _maps(r: Tensor, norm: Tensor, theta: Tensor, margin: float, scale: float) -> Tensor:
    """G, u and w, stacked. w = 1 - q without its rounding: where one pixel has all the energy it is eps / (R + eps)."""
    w = (norm - r).add_(ENERGY_EPS).div_(norm + ENERGY_EPS)
    u = (margin * theta).cos_()
    return torch.stack((-F.softplus(scale * (w - u)), u, w))


def _slopes(q: Tensor, theta: Tensor, u: Tensor, w: Tensor, margin: float, scale: float) -> Tensor:
    """dG/dq, du/dq and dw/dq, stacked."""
    du = (margin * torch.sin(margin * theta)).div_(torch.sin(theta)).masked_fill_(q.abs() > 1 - CLAMP, 0)
    return torch.stack((scale * torch.sigmoid(scale * (w - u)) * (du + 1), du, torch.full_like(du, -1)))


def forward(
    student: list[Tensor],
    teacher: list[Tensor],
    layer_weights: list[float],
    margin: float,
    scale: float,
    local_weight: float,
    reduce: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted losses of the layers, (L,) or their sum, and kappa of every layer, flat: dloss/dA = kappa A."""
    dtype = compute_dtype(*student, *teacher)
    losses, kappas = [], []
    for s, t, layer_weight in zip(student, teacher, layer_weights, strict=True):
        batch, _, height, width = s.shape
        loss = torch.zeros((), dtype=dtype, device=s.device)
        losses.append(loss)
        if batch * height * width == 0:
            continue
        r = torch.stack((_energy(s, dtype), _energy(t, dtype)))  # (2, B, H, W): student, teacher
        norm = _energy_norm(r)
        q = r / (norm + ENERGY_EPS)
        theta = q.clamp(-1 + CLAMP, 1 - CLAMP).acos_()
        maps = _maps(r, norm, theta, margin, scale)  # (3, 2, B, H, W)
        h = torch.zeros_like(q[0])
        slopes = _slopes(q[0], theta[0], maps[1, 0], maps[2, 0], margin, scale) if need_grad else None
        for top, left, weight in regions(height, width, local_weight):
            v = maps[..., top, left]
            norms = _norm(v)
            length = norms.clamp(min=UNIT_EPS)
            unit = v / length
            difference = unit[:, 0] - unit[:, 1]
            e = difference.square().sum((-2, -1), keepdim=True)
            c = layer_weight * weight / (3 * batch * v[0, 0, 0].numel())
            loss += c * e.sum()
            if slopes is not None:
                # <x, D>: e / 2 for unit vectors. Under the clamp (a region of one bright pixel) a vector is shorter
                # than 1, and the student's norm is a constant
                of_1 = (norms / length).square()
                inner = ((e + of_1[:, 0] - of_1[:, 1]) / 2).masked_fill_(norms[:, 0] < UNIT_EPS, 0)
                dv = difference.sub_(inner * unit[:, 0]).mul_(2 * c / length[:, 0])
                h[..., top, left] += dv.mul_(slopes[..., top, left]).sum(0)
        if need_grad:
            direction = torch.where(norm[0] > 0, r[0] / norm[0], 0)  # r / R, and 0 on a dead map
            inner = (h * q[0]).sum((-2, -1), keepdim=True)
            kappas.append((2 * (h - inner * direction) / (norm[0] + ENERGY_EPS)).flatten())
    total = torch.stack(losses)
    return total.sum() if reduce else total, torch.cat(kappas) if kappas else total.new_empty(0)


def backward(grad: Tensor, student: list[Tensor], kappa: Tensor) -> list[Tensor]:
    """grad * kappa * A of each layer, in the layer's shape, dtype and memory format; grad is () or (L,)."""
    gradients = []
    sizes = [math.prod((s.shape[0], *s.shape[2:])) for s in student]
    for s, k, g in zip(student, kappa.split(sizes), grad.expand(len(student)).unbind(0), strict=True):
        factor = (k * g).view(s.shape[0], 1, *s.shape[2:])
        gradients.append(
            torch.mul(s, factor, out=grad_like(s)) if s.dtype == k.dtype else grad_like(s).copy_(s * factor)
        )
    return gradients
