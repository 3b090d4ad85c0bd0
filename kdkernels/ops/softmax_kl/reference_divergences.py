"""The divergences of softmax_kl's reference but the forward KL. With p the teacher's and q the student's probabilities,

    d/dz_j of sum_k f(p_k, q_k)  =  q_j (h_j - sum_k q_k h_k) / T,    h = df/dq, the slope

    reverse       f = q log(q / p)                              h = log(q / p)
    jsd           f = b p log(p / m) + (1 - b) q log(q / m)     h = (1 - b) log(q / m)
    skew          f = p log(p / m)                              h = (1 - b)^2 (q - p) / m
    skew_reverse  f = q log(q / m)                              h = log(q / m) - b (1 - b) (q - p) / m

up to constants; m = b p + (1 - b) q, and b is beta, or 1 - beta in skew_reverse. All is made from d = log(p / q), which
is small where the networks are close, so that nothing cancels; and an error that all d of a row share, that of the
log-sums, cancels in h_j - sum_k q_k h_k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .op import Rows
from .reference_common import bregman, weighted


def divergence(x: Rows, p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1) the divergence, and the mean of its slopes."""
    if x.divergence == "reverse":
        return bregman(-d, p, q), weighted(q, -d).sum(1, keepdim=True)
    b = _share(x)
    mix, m = mixture(d, b), b * p + (1 - b) * q
    value = torch.zeros_like(d[:, :1])
    if x.divergence != "skew_reverse":
        value = value + (b if x.divergence == "jsd" else 1.0) * bregman(mix.log_p, m, p)
    if x.divergence != "skew":
        value = value + (1 - b if x.divergence == "jsd" else 1.0) * bregman(mix.log_q, m, q)
    return value, weighted(q, _mixture_slope(x, mix, b)).sum(1, keepdim=True)


def slope(x: Rows, d: Tensor) -> Tensor:
    """h, (N, C). Where q is 0 it may be anything."""
    if x.divergence == "reverse":
        return -d
    b = _share(x)
    return _mixture_slope(x, mixture(d, b), b)


def _share(x: Rows) -> float:
    """The teacher's share of the mixture."""
    return 1 - x.beta if x.divergence == "skew_reverse" else x.beta


class Mixture(NamedTuple):
    """m = b p + (1 - b) q beside p and q, (N, C) each."""

    log_p: Tensor  # log(p / m)
    log_q: Tensor  # log(q / m)
    ratio: Tensor  # (q - p) / m


def mixture(d: Tensor, b: float) -> Mixture:
    teacher_is_larger = d > 0
    e = -torch.expm1(-d.abs())  # 1 - the smaller over the larger of p and q
    w = torch.where(teacher_is_larger, torch.full_like(d[:1, :1], 1 - b), b)  # the smaller one's share
    y = w * e  # 1 - m over the larger one
    far = y > 0.5
    m = torch.where(far, (1 - w) + w * torch.exp(-d.abs()), 1 - y)
    log = torch.where(far, -m.log(), -torch.log1p(-torch.where(far, 0.0, y)))  # log of the larger one over m
    return Mixture(
        torch.where(teacher_is_larger, log, log + d),
        torch.where(teacher_is_larger, log - d, log),
        torch.where(teacher_is_larger, -e, e) / m,
    )


def _mixture_slope(x: Rows, mix: Mixture, b: float) -> Tensor:
    if x.divergence == "jsd":
        return (1 - b) * mix.log_q
    if x.divergence == "skew":
        return (1 - b) ** 2 * mix.ratio
    return mix.log_q - b * (1 - b) * mix.ratio
