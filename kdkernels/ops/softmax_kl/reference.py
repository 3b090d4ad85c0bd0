"""softmax_kl in plain PyTorch, made fast: the fallback. What it computes is in definition.py.

Notation: z logits, T temperature, p = softmax(z), q = softmax(z / T), s student, t teacher, {a, b} a row's labels.
Every softmax is kept as (maximum, log of the sum of exponentials above it): adding the two would round away
everything below 1e-7 of the largest logit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype, may_hold
from .op import STANDARD_EPS, STATS, Rows
from .reference_common import RowLabels, difference, forward_kl, read_labels, weighted
from .reference_decoupled import Network, decoupled, decoupled_gradient
from .reference_divergences import divergence, slope


def supports(*tensors: Tensor) -> str | None:
    return None


def forward(x: Rows, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x.student, x.teacher)
    n, classes = x.student.shape
    labels = read_labels(x.labels, classes, dtype)

    s_max = x.student.amax(1, keepdim=True).to(dtype)
    s = x.student - s_max
    stats = [s_max, *[torch.zeros_like(s_max)] * (x.stats - 1)]
    rows = torch.zeros(n, 1, dtype=dtype, device=s.device)
    if x.terms.ce:
        stats[2] = _logz(s)
        rows -= x.terms.ce * _log_likelihood(s, stats[2], x, labels)
    if x.terms.soft:
        rows += _soft_terms(s, stats, x, labels)

    count = torch.full((), max(n, 1), dtype=dtype, device=s.device)
    if labels is not None:
        rows = rows.masked_fill(~labels.valid, math.nan).masked_fill(~labels.keep, 0)
        count = labels.keep.sum().clamp(min=1).to(dtype)
    scale = 1 / count if x.reduction == "mean" else torch.ones_like(count)
    loss = rows[:, 0].clone() if x.reduction == "none" else rows.sum() * scale
    return loss, torch.cat(stats, 1).t().contiguous() if need_grad else loss.new_empty(0), scale


def _log_likelihood(s: Tensor, logz: Tensor, x: Rows, labels: RowLabels | None) -> Tensor:
    """sum_k y_k log p_k, (N, 1), from s = z - max and log Z."""
    if labels is None:
        assert x.labels.target is not None
        result = weighted(x.labels.target.to(s.dtype), s - logz).sum(1, keepdim=True)
    else:
        result = weighted(labels.weight_a, s.gather(1, labels.a) - logz)
        if x.labels.mixed is not None:
            result = result + weighted(labels.weight_b, s.gather(1, labels.b) - logz)
    if e := x.labels.smoothing:
        result = (1 - e) * result + e * (s.mean(1, keepdim=True) - logz)
    return result


def _soft_terms(s: Tensor, stats: list[Tensor], x: Rows, labels: RowLabels | None) -> Tensor:
    """The terms with a teacher, (N, 1), and their statistics; s is z_s - max and is overwritten."""
    stats[1] = x.teacher.amax(1, keepdim=True).to(s.dtype)
    t = x.teacher - stats[1]
    spread_s, spread_t = (_spread(z) if x.standardize else None for z in (s, t))
    zs, zt = (_over_temperature(z, x, spread and spread.inverse) for z, spread in ((s, spread_s), (t, spread_t)))
    stats[3] = _logz(zs)
    if x.divergence == "forward":
        kl, stats[4] = forward_kl(zs, stats[3], zt)
    else:
        logz_t = _logz(zt)
        stats[4] = logz_t - stats[3]
        d = torch.sub(zt, zs).sub_(stats[4])
        kl, stats[STATS] = divergence(x, (zt - logz_t).exp_(), (zs - stats[3]).exp_(), d)
    rows = x.terms.kl * kl if x.terms.kl else torch.zeros_like(kl)
    if labels is not None and x.terms.decoupled:
        inverse = (None, None) if spread_s is None or spread_t is None else (spread_s.inverse, spread_t.inverse)
        terms, stats[STATS : STATS + 4] = decoupled(*_networks(zs, zt, stats, x, *inverse), stats[4], x, labels)
        rows = rows + terms
    if spread_s is not None and spread_t is not None:
        mean, std = spread_s.mean * spread_s.inverse, spread_s.std * spread_s.inverse  # of z'
        stats[-4:-2] = spread_s.inverse, spread_t.inverse
        gradient = _soft_gradient(zs, zt, stats, x, labels)
        inner = gradient.mul_(zs.mul_(x.temperature).sub_(mean)).sum(1, keepdim=True)  # <dL/dz', z'>
        stats[-2:] = mean, (inner / (max(s.shape[1] - 1, 1) * std)).masked_fill(spread_s.std == 0, 0)
    return rows


class Spread(NamedTuple):
    """Of the rows, (N, 1) each."""

    mean: Tensor
    std: Tensor  # unbiased, 0 for a single class
    inverse: Tensor


def _spread(z: Tensor) -> Spread:
    correction = min(1, z.shape[1] - 1)
    var, mean = torch.var_mean(z, 1, correction=correction, keepdim=True)
    std = var.sqrt()
    if may_hold(lost := (var < 1e-30) | (var == math.inf)):  # squares that float32 does not hold
        top = z.abs().amax(1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
        scaled = torch.var_mean(z / top, 1, correction=correction, keepdim=True)
        std, mean = torch.where(lost, scaled[0].sqrt() * top, std), torch.where(lost, scaled[1] * top, mean)
    return Spread(mean, std, 1 / (std + STANDARD_EPS))


def _over_temperature(z: Tensor, x: Rows, inverse_std: Tensor | None) -> Tensor:
    """z / T, standardised but for the mean, which no softmax sees; z is overwritten."""
    return z.mul_(1 / x.temperature if inverse_std is None else inverse_std / x.temperature)


def _networks(
    zs: Tensor, zt: Tensor, stats: list[Tensor], x: Rows, inverse_s: Tensor | None, inverse_t: Tensor | None
) -> tuple[Network, Network]:
    """What the decoupled terms need of both; the inverse deviations where logits are standardised."""
    s_max, t_max, _, logz_s, log_ratio = stats[:STATS]
    over_s, over_t = ((1.0 if i is None else i) / x.temperature for i in (inverse_s, inverse_t))
    return Network(x.student, zs, s_max, logz_s, over_s), Network(x.teacher, zt, t_max, logz_s + log_ratio, over_t)


def _logz(z: Tensor) -> Tensor:
    """log Z of z - max: the largest logit stands for exp(0), so its probability is 1 / Z. exp().sum() is slower."""
    return -z.softmax(1).amax(1, keepdim=True).log_()


def backward(grad: Tensor, x: Rows, stats: Tensor, scale: Tensor, in_place: bool = False) -> Tensor:
    dtype = compute_dtype(x.student, x.teacher)
    labels = read_labels(x.labels, x.student.shape[1], dtype)
    saved = list(stats[:, :, None].unbind(0))

    overwrite = in_place and x.student.dtype == dtype and not x.terms.decoupled  # which reads the logits again
    s = x.student.sub_(saved[0]) if overwrite else x.student - saved[0]
    result = _ce_gradient(s, saved[2], x, labels) if x.terms.ce else None
    if x.terms.soft:
        soft = _soft_gradient_of_logits(s, saved, x, labels)
        result = soft if result is None else result.add_(soft)
    if result is None:
        result = torch.zeros_like(s)
    factor = (grad * scale).reshape(-1, 1)  # upstream gradient, one or one per row
    if labels is not None:
        factor = torch.where(labels.valid, factor, math.nan).masked_fill(~labels.keep, 0)
        if may_hold(~labels.keep):
            result.masked_fill_(~labels.keep, 0)  # an ignored row of NaN has zero gradient too
    result.mul_(factor)
    return x.student.copy_(result) if in_place else result.to(x.student.dtype).contiguous()


def _soft_gradient_of_logits(s: Tensor, stats: list[Tensor], x: Rows, labels: RowLabels | None) -> Tensor:
    """The gradient of the terms with a teacher; s is z_s - max and is overwritten."""
    inverse_s, inverse_t, mean, lost = stats[-4:] if x.standardize else [None] * 4
    zs, zt = _over_temperature(s, x, inverse_s), _over_temperature(x.teacher - stats[1], x, inverse_t)
    if inverse_s is None or mean is None or lost is None:
        return _soft_gradient(zs, zt, stats, x, labels, overwrite=True)
    result = _soft_gradient(zs, zt, stats, x, labels)
    standardised = zs.mul_(x.temperature).sub_(mean)
    return result.sub_(standardised.mul_(lost)).mul_(inverse_s)


def _soft_gradient(
    zs: Tensor, zt: Tensor, stats: list[Tensor], x: Rows, labels: RowLabels | None, overwrite: bool = False
) -> Tensor:
    """The gradient of the terms with a teacher by T z_s."""
    alpha = 1 / x.temperature
    if x.divergence != "forward":
        h = slope(x, torch.sub(zt, zs).sub_(stats[4])).sub_(stats[STATS])
        return weighted(torch.sub(zs, stats[3]).exp_(), h).mul_(x.terms.kl * alpha)
    result = None
    if labels is not None and x.terms.decoupled:
        inverse = (stats[-4], stats[-3]) if x.standardize else (None, None)
        networks = _networks(zs, zt, stats, x, *inverse)
        result = decoupled_gradient(*networks, stats[4], stats[STATS : STATS + 4], x, labels).mul_(alpha)
        if not x.terms.kl:
            return result
    d = torch.sub(zt, zs).sub_(stats[4])
    q_s = torch.exp(zs, out=zs if overwrite else None).mul_(stats[3].neg().exp_())
    q_t = torch.exp(zt, out=zt if overwrite else None).mul_((stats[3] + stats[4]).neg_().exp_())
    kl = difference(q_s, q_t, d).mul_(x.terms.kl * alpha)
    return kl if result is None else result.add_(kl)


def _ce_gradient(s: Tensor, logz: Tensor, x: Rows, labels: RowLabels | None) -> Tensor:
    """w_ce (p sum(y) - y), y smoothed, from s = z - max and log Z."""
    result, e = (s - logz).exp_(), x.labels.smoothing
    if labels is None:
        assert x.labels.target is not None
        y = x.labels.target.to(s.dtype)
        result.mul_((1 - e) * y.sum(1, keepdim=True) + e).sub_(y, alpha=1 - e)
    else:
        result.scatter_add_(1, labels.a, (e - 1) * labels.weight_a)
        if x.labels.mixed is not None:
            result.scatter_add_(1, labels.b, (e - 1) * labels.weight_b)
    if e:
        result -= e / s.shape[1]
    return result.mul_(x.terms.ce)
