"""The decoupled terms of softmax_kl's reference, TCKD and NCKD, and their gradient.

All is made from d = log(q_t / q_s), of a class or of the mass of several, so that nothing cancels where the networks
are close.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .op import Rows
from .reference_common import RowLabels, bregman, difference, forward_kl

NEG_INF = -math.inf


class NonTarget(NamedTuple):
    """The softmax over the classes that a row is not labelled with, for one network."""

    z: Tensor  # (N, C) (z - max) / T, labelled classes at -inf
    max: Tensor  # (N, 1) of the logits, 0 where no other class has any probability
    logz: Tensor  # (N, 1), -inf there


class Network(NamedTuple):
    """A network's rows. Scales are numbers, or (N, 1) where logits are standardised."""

    logits: Tensor  # (N, C), as they are
    z: Tensor  # (N, C) (z - max) / T
    max: Tensor  # (N, 1)
    logz: Tensor  # (N, 1)
    over_t: Tensor | float  # 1 / T


class Share(NamedTuple):
    """(N, 1) each: a probability of both networks, and d."""

    s: Tensor
    t: Tensor
    d: Tensor

    def difference(self) -> Tensor:
        return difference(self.s, self.t, self.d.clone())


def _masked(net: Network, labels: RowLabels) -> Tensor:
    """The logits with -inf at the labelled classes."""
    return net.logits.to(net.z.dtype).scatter(1, labels.a, NEG_INF).scatter(1, labels.b, NEG_INF)


def _non_target(net: Network, labels: RowLabels) -> NonTarget:
    z = _masked(net, labels)
    top = z.amax(1, keepdim=True)
    top = torch.where(top == NEG_INF, torch.zeros_like(top), top)  # no other class: its mass is exp(-inf) = 0
    top = top + (net.max - net.max)  # an infinity or NaN among the labelled classes must not hide
    z = z.sub_(top).mul_(net.over_t)
    return NonTarget(z, top, z.exp().sum(1, keepdim=True).log())


def decoupled(s: Network, t: Network, log_ratio: Tensor, x: Rows, labels: RowLabels) -> tuple[Tensor, list[Tensor]]:
    """w_target TCKD + w_non_target NCKD, and the statistics of the classes that are not labelled."""
    others_s, others_t = _non_target(s, labels), _non_target(t, labels)
    kl, ratio = forward_kl(others_s.z, others_s.logz, others_t.z)
    empty = (others_s.logz == NEG_INF) | (others_t.logz == NEG_INF)
    ratio = torch.where(empty, others_t.logz, ratio)  # the logarithm of no mass counts as 0 beside some
    kl = torch.where(empty, torch.where(others_t.logz == NEG_INF, 0.0, math.inf), kl)
    stats = [others_s.max, others_t.max, others_s.logz, ratio]
    rows = torch.zeros_like(kl)
    if x.terms.target_kl:
        shares = _target_shares(s, t, log_ratio, stats, labels)
        rows = x.terms.target_kl * sum((bregman(q.d, q.s, q.t) for q in shares), rows)
    if x.terms.non_target_kl:
        rows = rows + x.terms.non_target_kl * kl
    return rows, stats


def _target_shares(s: Network, t: Network, log_ratio: Tensor, stats: list[Tensor], labels: RowLabels) -> list[Share]:
    """What the target term compares: the labels' probabilities, that of b being 0 where it is a, and the others' mass:
    from the labels' where that is less, else from their own log-sum."""
    at_labels = []
    for index in (labels.a, labels.b):
        z_s, z_t = s.z.gather(1, index), t.z.gather(1, index)
        at_labels.append(Share((z_s - s.logz).exp(), (z_t - t.logz).exp(), z_t - z_s - log_ratio))
    one = labels.a == labels.b
    a, b = at_labels[0], Share(*(x.masked_fill(one, 0) for x in at_labels[1]))
    mass_s, mass_t = a.s + b.s, a.t + b.t
    little = (mass_s < 0.5) & (mass_t < 0.5)
    more = (a.difference() + b.difference()).masked_fill(~little, 0)
    max_s, max_t, logz_s, ratio = stats
    top_s, top_t = (max_s - s.max) * s.over_t, (max_t - t.max) * t.over_t
    log_s, log_t = top_s + logz_s - s.logz, top_t + _other_logz(logz_s, ratio) - t.logz
    d = torch.where((log_s == NEG_INF) | (log_t == NEG_INF), log_t - log_s, top_t - top_s + ratio - log_ratio)
    d = torch.where(little, torch.log1p(more / (1 - mass_s)), d)
    return [a, b, Share(torch.where(little, 1 - mass_s, log_s.exp()), torch.where(little, 1 - mass_t, log_t.exp()), d)]


def _other_logz(logz_s: Tensor, ratio: Tensor) -> Tensor:
    """log Z of the teacher's other classes."""
    return logz_s.masked_fill(logz_s == NEG_INF, 0) + ratio


def decoupled_gradient(
    s: Network, t: Network, log_ratio: Tensor, stats: list[Tensor], x: Rows, labels: RowLabels
) -> Tensor:
    """d(w_target TCKD + w_non_target NCKD)/dz_s / T."""
    max_s, max_t, logz_s, ratio = stats
    logz_t = _other_logz(logz_s, ratio)
    z_s = _masked(s, labels).sub_(max_s).mul_(s.over_t)
    z_t = _masked(t, labels).sub_(max_t).mul_(t.over_t)
    d = torch.sub(z_t, z_s).sub_(ratio.masked_fill((logz_s == NEG_INF) | (logz_t == NEG_INF), 0))
    q_s, q_t = (z.sub_(logz.masked_fill(logz == NEG_INF, 0)).exp_() for z, logz in ((z_s, logz_s), (z_t, logz_t)))
    a, b, others = (share.difference() for share in _target_shares(s, t, log_ratio, stats, labels))
    gradient = difference(q_s, q_t, d).mul_(x.terms.non_target_kl).addcmul_(q_s, x.terms.target_kl * others)
    gradient.scatter_(1, labels.b, x.terms.target_kl * b)
    return gradient.scatter_(1, labels.a, x.terms.target_kl * a)
