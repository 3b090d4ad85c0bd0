"""energy in plain PyTorch, made fast: the fallback, and the powers other than 2. What it computes is in definition.py.

Gradients are closed forms; the difference D of two unit maps is formed before it is squared, and <u_s, D> is taken from
its square, so that nothing cancels when the student is close to its teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import compute_dtype, grad_like
from .op import UNIT_EPS, AttentionPairs

CACHED = 1 << 18  # numbers that stay in a core's cache


def supports(*tensors: Tensor) -> str | None:
    return None


def energies(activation: Tensor) -> Tensor:
    return power_sums(activation, 2.0)


def power_sums(x: Tensor, power: float, dtype: torch.dtype | None = None) -> Tensor:
    """sum_c |x[c]|^power (B, H, W). On a CPU in parts, to keep the powers in the cache; a fused vector_norm is five
    times slower."""
    dtype = dtype or compute_dtype(x)
    samples = CACHED // max(1, x[:1].numel()) if x.device.type == "cpu" else len(x)
    parts = (part.to(dtype) for part in x.split(max(1, samples)))
    return torch.cat([(a.square() if power == 2 else a.abs().pow_(power)).sum(1) for a in parts])


def norm(v: Tensor) -> Tensor:
    """(B, 1, 1) the length of each map, by way of its largest number: squares of large energies overflow fp32."""
    if v.numel() == 0:
        return v.new_zeros(len(v), 1, 1)
    top = v.amax((-2, -1), keepdim=True).clamp_(min=torch.finfo(v.dtype).tiny)
    return torch.linalg.vector_norm(v / top, dim=(-2, -1), keepdim=True).mul_(top)


def slope(x: Tensor, power: float, dtype: torch.dtype) -> Tensor:
    """sign(x) |x|^(power - 1): the derivative of |x|^power / power."""
    x = x.to(dtype)
    return x.abs().pow_(power - 1).mul_(x.sign())


def forward(x: AttentionPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(*x.student, *x.teacher)
    losses, kappas = [], []
    for s, t, factor in zip(x.student, x.teacher, x.factors(), strict=True):
        pixels = s.shape[2] * s.shape[3]
        loss, kappa = _distance(*_unit_maps(s, t, x.power, dtype), factor / max(pixels, 1), x.absolute, need_grad)
        losses.append(loss)
        kappas.append(kappa.mul_(x.power / max(s.shape[1], 1)).flatten())
    total = torch.stack(losses)  # (L, B)
    total = total if x.per_sample else total.sum(1)
    total = total if x.per_layer else total.sum(0)
    return total, torch.cat(kappas) if need_grad else total.new_empty(0)


def _unit_maps(s: Tensor, t: Tensor, power: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(2, B, H, W) unit maps of student and teacher, and (2, B, 1, 1) the lengths of the maps."""
    m = torch.stack([power_sums(a, power, dtype) / max(a.shape[1], 1) for a in (s, t)])
    lengths = torch.stack([norm(m[0]), norm(m[1])])
    return m.div_(lengths.clamp(min=UNIT_EPS)), lengths


def _distance(u: Tensor, lengths: Tensor, c: float, absolute: bool, need_grad: bool) -> tuple[Tensor, Tensor]:
    """c sum_n |D_n| or c sum_n D_n^2 of D = u_s - u_t (B,), and its gradient by the student's map."""
    d = u[0] - u[1]
    e = (d.abs() if absolute else d.square()).sum((1, 2), keepdim=True)
    loss = c * e.flatten()
    if not need_grad:
        return loss, loss.new_empty(0)
    if absolute:
        pull = torch.where(d.isnan(), d, d.sgn())  # of NaN PyTorch's is 0
        inner = (u[0] * pull).sum((1, 2), keepdim=True)
    else:
        # <u_s, D> = |D|^2 / 2 for unit vectors; a map under the eps is shorter than 1
        of_1 = (lengths / lengths.clamp(min=UNIT_EPS)).square()
        pull, inner = 2 * d, e + of_1[0] - of_1[1]
    inner = inner.masked_fill(lengths[0] < UNIT_EPS, 0)  # whose length is a constant
    return loss, (pull - inner * u[0]).mul_(c / lengths[0].clamp(min=UNIT_EPS))


def backward(grad: Tensor, student: list[Tensor], kappa: Tensor) -> list[Tensor]:
    gradients = []
    sizes = [math.prod((s.shape[0], *s.shape[2:])) for s in student]
    for s, k, g in zip(student, kappa.split(sizes), grad, strict=True):
        factor = k.view(s.shape[0], 1, *s.shape[2:]) * g[:, None, None, None]
        gradients.append(
            torch.mul(s, factor, out=grad_like(s)) if s.dtype == k.dtype else grad_like(s).copy_(s * factor)
        )
    return gradients
