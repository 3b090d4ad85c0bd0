"""nkd in plain PyTorch: the fallback. What it computes is in definition.py.

The label's probability against all others is log p_y = -softplus(a), a = log(sum of e^z over the others) - z_y, which
loses no digits where one of the two is far above the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import LabelledRows


def supports(*tensors: Tensor) -> str | None:
    return None


def _rows(x: LabelledRows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both networks' non-target logits with their target's (N, 1), the label, and which rows count and are valid."""
    dtype, classes = compute_dtype(x.student, x.teacher), x.student.shape[1]
    label = x.target.clamp(0, classes - 1)[:, None]
    counts = (x.target != x.ignore_index)[:, None]
    valid = ((x.target >= 0) & (x.target < classes))[:, None]
    s, t = x.student.to(dtype), x.teacher.to(dtype)
    return (
        s.scatter(1, label, -math.inf),
        t.scatter(1, label, -math.inf),
        _target(s, label),
        _target(t, label),
        label,
        counts,
        valid,
    )


def _target(z: Tensor, label: Tensor) -> Tensor:
    """The target's logit: NaN where it is infinite, which the softmax cannot take either."""
    z_y = z.gather(1, label)
    return torch.where(z_y == math.inf, math.nan, z_y)


def _softmax(z: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The exponentials of z / T, their maximum before (0 where there is no probability) and log Z relative to it."""
    top = z.amax(1, keepdim=True)
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    e = ((z - top) / temperature).exp_()
    return e, top, e.sum(1, keepdim=True).log()


def forward(x: LabelledRows, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    s, t, s_y, t_y, _, counts, valid = _rows(x)
    _, s_max, log_s = _softmax(s, x.temperature)
    e_t, t_max, log_t = _softmax(t, x.temperature)
    log_p, log_u = log_s, log_t
    if x.temperature != 1:
        log_p, log_u = ((z - top).exp_().sum(1, keepdim=True).log() for z, top in ((s, s_max), (t, t_max)))
    weight = torch.sigmoid(t_y - t_max - log_u)
    target = _weighted(weight, torch.logaddexp(s_max + log_p - s_y, torch.zeros_like(s_y)))
    # a class without teacher probability adds nothing, and neither do classes without any
    cross = torch.where(e_t == 0, 0, e_t * ((s - s_max) / x.temperature)).sum(1, keepdim=True)
    z_t = log_t.exp()
    entropy = torch.where(z_t == 0, 0, torch.where(log_s == -math.inf, math.inf, log_s - cross / z_t))
    rows = target + x.gamma * x.temperature**2 * entropy
    rows = torch.where(counts, torch.where(valid, rows, math.nan), 0)[:, 0]
    scale = torch.ones((), dtype=rows.dtype, device=rows.device)
    if x.reduction == "mean":
        scale = 1 / counts.sum().clamp(min=1).to(rows.dtype)
    stats = (
        torch.cat([s_max, log_s, log_p, t_max, log_t, weight], 1).t().contiguous() if need_grad else rows.new_empty(0)
    )
    return rows if x.reduction == "none" else rows.sum() * scale, stats, scale


def backward(grad: Tensor, x: LabelledRows, stats: Tensor, scale: Tensor) -> Tensor:
    s, t, s_y, _, label, counts, valid = _rows(x)
    s_max, log_s, log_p, t_max, log_t, weight = (stat[:, None] for stat in stats)
    upstream = grad.to(stats.dtype).expand(len(s))[:, None] * scale
    soft = (upstream * (x.gamma * x.temperature)).masked_fill(log_t == -math.inf, 0)  # no others: their term is 0
    hard = upstream * weight * torch.sigmoid(s_max + log_p - s_y)  # sigmoid: 1 - p_y
    if x.temperature == 1:
        out = ((soft + hard) * _inverse(log_s)) * (s - s_max).exp_()
    else:
        out = (soft * _inverse(log_s)) * ((s - s_max) / x.temperature).exp_()
        out += (hard * _inverse(log_p)) * (s - s_max).exp_()
    out -= (soft * _inverse(log_t)) * ((t - t_max) / x.temperature).exp_()
    out.scatter_(1, label, -hard)
    return torch.where(counts, torch.where(valid, out, math.nan), 0).to(x.student.dtype)


def _inverse(log_z: Tensor) -> Tensor:
    """1 / Z, and 0 where there is nothing."""
    return torch.where(log_z == -math.inf, 0, (-log_z).exp())


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, where a weight of 0 means 0 even beside an infinity, but not beside NaN."""
    return torch.where((weight == 0) & (value == value), 0, weight * value)
