"""The decoupled terms of softmax_kl's reference, TCKD and NCKD, and their gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .op import Rows
from .reference_common import RowLabels, bregman, weighted

NEG_INF = -math.inf


class NonTarget(NamedTuple):
    """The softmax over the classes that a row is not labelled with, for one network."""

    z: Tensor  # (N, C) z / T - max, labelled classes at -inf
    max: Tensor  # (N, 1), 0 where no other class has any probability
    logz: Tensor  # (N, 1), -inf there


def _non_target(z: Tensor, z_max: Tensor, labels: RowLabels) -> NonTarget:
    z = z.scatter(1, labels.a, NEG_INF).scatter(1, labels.b, NEG_INF)
    top = z.amax(1, keepdim=True)
    top = torch.where(top == NEG_INF, torch.zeros_like(top), top)  # no other class: its mass is exp(-inf) = 0
    top = top + (z_max - z_max)  # an infinity or NaN among the labelled classes must not hide
    return NonTarget(z, top, (z - top).exp().sum(1, keepdim=True).log())


def _non_target_log_q(z: Tensor, top: Tensor, logz: Tensor) -> Tensor:
    return torch.where(logz == NEG_INF, NEG_INF, z - top - logz)


def _labelled(values: Tensor, labels: RowLabels) -> tuple[Tensor, Tensor]:
    """values at a and at b, b's replaced by 0 where it is a."""
    at_b = values.gather(1, labels.b)
    return values.gather(1, labels.a), torch.where(labels.b == labels.a, torch.zeros_like(at_b), at_b)


def _log_mass(labelled_mass: Tensor, others: NonTarget, logz: Tensor) -> Tensor:
    """log of the other classes' probability: log1p of the labelled mass where that is small, else their log-sum."""
    return torch.where(labelled_mass < 0.5, torch.log1p(-labelled_mass), others.max + others.logz - logz)


def decoupled(
    zs: Tensor, zt: Tensor, stats: list[Tensor], x: Rows, labels: RowLabels
) -> tuple[Tensor | float, list[Tensor]]:
    """w_target TCKD + w_non_target NCKD, and the statistics of the classes that are not labelled."""
    s_max, t_max, _, logz_s, log_ratio = stats
    logz_t = logz_s + log_ratio
    others_s, others_t = _non_target(zs, s_max, labels), _non_target(zt, t_max, labels)
    rows: Tensor | float = 0.0
    if x.terms.target_kl:
        rows = x.terms.target_kl * _target_kl(zs - logz_s, zt - logz_t, logz_s, logz_t, others_s, others_t, labels)
    if x.terms.non_target_kl:
        rows = rows + x.terms.non_target_kl * _non_target_kl(others_s, others_t)
    return rows, [others_s.max, others_t.max, others_s.logz, others_t.logz]


def _non_target_kl(others_s: NonTarget, others_t: NonTarget) -> Tensor:
    """The KL of the other classes, renormalised; 0 where the teacher has no mass there."""
    log_s, log_t = _non_target_log_q(*others_s), _non_target_log_q(*others_t)
    kl = bregman(log_t - log_s, log_s.exp(), log_t.exp())
    return kl.masked_fill(others_t.logz == NEG_INF, 0)


def _target_kl(
    log_qs: Tensor,
    log_qt: Tensor,
    logz_s: Tensor,
    logz_t: Tensor,
    others_s: NonTarget,
    others_t: NonTarget,
    labels: RowLabels,
) -> Tensor:
    """sum over the labelled classes of q_t log(q_t / q_s), plus S_t log(S_t / S_s) for the mass S of the others."""
    qt = _labelled(log_qt.exp(), labels)
    qs = _labelled(log_qs.exp(), labels)
    log_ss = _log_mass(qs[0] + qs[1], others_s, logz_s)
    log_st = _log_mass(qt[0] + qt[1], others_t, logz_t)
    result = weighted(log_st.exp(), log_st - log_ss)
    for q, index in zip(qt, (labels.a, labels.b), strict=True):
        result = result + weighted(q, log_qt.gather(1, index) - log_qs.gather(1, index))
    return result


def decoupled_gradient(
    s: Tensor, t: Tensor, qs: Tensor, qt: Tensor, stats: list[Tensor], x: Rows, labels: RowLabels
) -> Tensor:
    """d(w_target TCKD + w_non_target NCKD)/ds, s being z_s / T, from the probabilities of both networks."""
    logz_s, log_ratio, max_s, max_t, other_logz_s, other_logz_t = stats[3:9]
    logz_t = logz_s + log_ratio
    others_s = _non_target_log_q(s, max_s, other_logz_s).exp()
    others_t = _non_target_log_q(t, max_t, other_logz_t).exp()
    (qs_a, qs_b), (qt_a, qt_b) = _labelled(qs, labels), _labelled(qt, labels)
    mass_s, mass_t = qs_a + qs_b, qt_a + qt_b
    # S_s - S_t from whichever side has the smaller numbers
    others = (max_s + other_logz_s - logz_s).exp() - (max_t + other_logz_t - logz_t).exp()
    difference = torch.where(mass_s < 0.5, mass_t - mass_s, others)
    w_target, w_non_target = x.terms.target_kl, x.terms.non_target_kl
    gradient = others_s * (w_target * difference + w_non_target) - w_non_target * others_t
    for index in (labels.a, labels.b):
        gradient.scatter_(1, index, w_target * (qs.gather(1, index) - qt.gather(1, index)))
    return gradient
