"""What the parts of softmax_kl's reference share: a row's labels, and sums that keep their digits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import may_hold
from .op import Labels


class RowLabels(NamedTuple):
    """Up to two labels per row, (N, 1) each, with their weights; ``keep`` is False on ignored rows."""

    a: Tensor
    b: Tensor
    weight_a: Tensor
    weight_b: Tensor
    keep: Tensor
    valid: Tensor


def read_labels(labels: Labels, classes: int, dtype: torch.dtype) -> RowLabels | None:
    """None without labels and with dense ones."""
    if labels.target is None or labels.dense:
        return None
    a, b = labels.target, labels.target if labels.mixed is None else labels.mixed
    keep = (a != labels.ignore_index) & (b != labels.ignore_index)
    valid = (a >= 0) & (a < classes) & (b >= 0) & (b < classes)
    weight_a = torch.ones((), dtype=dtype, device=a.device) if labels.lam is None else labels.lam.to(dtype)
    weight_a = weight_a.expand(a.shape)
    a, b = a.clamp(0, classes - 1), b.clamp(0, classes - 1)
    return RowLabels(a[:, None], b[:, None], weight_a[:, None], 1 - weight_a[:, None], keep[:, None], valid[:, None])


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, where a weight of 0 means 0 even beside an infinity."""
    return torch.where(weight == 0, torch.zeros_like(value), weight * value)


def bregman(delta: Tensor, qs: Tensor, qt: Tensor) -> Tensor:
    """sum_k of q_t delta - q_t + q_s, delta = log(q_t / q_s): the KL as a sum of terms that are all positive."""
    small = delta.abs() < (0.25 if delta.dtype == torch.float32 else 0.02)
    # delta + expm1(-delta) by its series
    series = 1 / 6 - delta * (1 / 24 - delta * (1 / 120 - delta * (1 / 720 - delta / 5040)))
    terms = torch.where(small, qt * delta.square() * (0.5 - delta * series), qt * (delta - 1) + qs)
    return torch.where(qt == 0, qs, terms).sum(1, keepdim=True)


def forward_kl(zs: Tensor, logz_s: Tensor, zt: Tensor) -> tuple[Tensor, Tensor]:
    """sum_k q_t log(q_t / q_s), and log(Z_t / Z_s); a class that the teacher gives no probability adds 0."""
    qt = zt.softmax(1)
    logz_t = -qt.amax(1, keepdim=True).log()
    log_ratio = logz_t - logz_s
    terms = torch.sub(zt, zs).mul_(qt)
    mean = terms.sum(1, keepdim=True)
    if may_hold(mean.isnan()):  # 0 times the infinity of a class at -inf
        mean = terms.masked_fill_(qt == 0, 0).sum(1, keepdim=True)
    kl = mean - log_ratio
    close = kl < 0.02  # so small a difference of numbers of order ten has lost too many digits
    if may_hold(close):
        delta = torch.sub(zt, zs)
        # Z_s / Z_t = 1 + u: the logarithm of a quotient near 1 has lost digits too
        u = bregman(delta, torch.sub(zs, logz_t).exp_(), qt) - mean
        log_ratio = torch.where(close, -torch.log1p(u), log_ratio)
        kl = torch.where(close, bregman(delta.sub_(log_ratio), torch.sub(zs, logz_s).exp_(), qt), kl)
    return kl, log_ratio


def difference(qs: Tensor, qt: Tensor, d: Tensor) -> Tensor:
    """q_s - q_t from d = log(q_t / q_s), which is overwritten: nothing cancels where the networks are close."""
    d.nan_to_num_(nan=0.0)  # where both are 0; those of a row with NaN are NaN themselves
    return d.mul_(-0.5).tanh_().mul_(qs + qt)
