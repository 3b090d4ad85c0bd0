"""The divergences of two distributions p (constant) and q, element by element, and how they move with log q.

Every one of them is a sum of generalised KLs, B(a, b) = a log(a / b) - a + b >= 0, of which nothing cancels:

    forward B(p, q)   reverse B(q, p)   jsd beta B(p, m) + (1 - beta) B(q, m)   skew B(p, m)   skew_reverse B(q, m)

with m = beta p + (1 - beta) q, of skew_reverse m = (1 - beta) p + beta q. Where p and q sum to 1 the extra -a + b do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _log_ratio(delta: Tensor, share: float) -> Tensor:
    """log(1 / (1 - share + share e^delta))."""
    near = -(share * delta.clamp(-1, 1).expm1()).log1p()
    far = -torch.logaddexp(delta + math.log(share), torch.full_like(delta, math.log1p(-share)))
    return torch.where(delta.abs() < 1, near, far)


def _kl(a: Tensor, delta: Tensor, b: Tensor) -> Tensor:
    """B(a, b) from delta = log(a / b)."""
    small = delta.abs() < (0.25 if delta.dtype == torch.float32 else 0.02)
    # delta + expm1(-delta) over delta^2, by its series
    series = 0.5 - delta * (1 / 6 - delta * (1 / 24 - delta * (1 / 120 - delta * (1 / 720 - delta / 5040))))
    return torch.where(a == 0, b, torch.where(small, a * delta.square() * series, a * (delta - 1) + b))


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a b, and 0 where a is, even beside an infinity."""
    return (a * b).masked_fill(a == 0, 0)


def divergence(
    kind: str, beta: float, log_p: Tensor, log_q: Tensor, delta: Tensor, partial: bool = False
) -> tuple[Tensor, Tensor]:
    """The terms D_j and q_j dD/dq_j; ``delta`` is log(p / q), as exactly as the caller has it.

    ``partial``: p and q need not sum to 1 and the terms are those of the bare formula, without -a + b.
    """
    p, q = log_p.exp(), log_q.exp()
    delta = delta.masked_fill((p == 0) & (q == 0), 0)
    if kind == "forward":
        return _kl(p, delta, q) + (p - q if partial else 0), -p
    if kind == "reverse":
        return _kl(q, -delta, p) + (q - p if partial else 0), _times(q, -delta) + (q if partial else 0)
    share = 1 - beta if kind == "skew_reverse" else beta  # of p in m
    m = share * p + (1 - share) * q
    p_over_m, q_over_m = _log_ratio(-delta, 1 - share), _log_ratio(delta, share)  # their logarithms
    if kind == "jsd":
        value = beta * _kl(p, p_over_m, m) + (1 - beta) * _kl(q, q_over_m, m)
        return value, (1 - beta) * _times(q, q_over_m)
    if kind == "skew":
        return _kl(p, p_over_m, m) + (p - m if partial else 0), -(1 - beta) * _times(q, p_over_m.exp())
    slope = _times(q, q_over_m + (1 - beta) * p_over_m.exp())
    return _kl(q, q_over_m, m) + (q - m if partial else 0), slope
