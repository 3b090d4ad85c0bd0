"""The divergences between p (constant) and q for row passes in plain PyTorch: their values, and how each class moves
them. As softmax_kl's reference has them, but also of columns or of k outcomes alone, whose sums need not be 1.
"""

from __future__ import annotations

from torch import Tensor

from ..softmax_kl.reference_common import bregman, weighted
from ..softmax_kl.reference_divergences import mixture


def divergence(
    kind: str, beta: float, log_p: Tensor, log_q: Tensor, delta: Tensor, partial: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum of the terms (n, 1), and q_j dD/dq_j (n, m); ``delta`` is log(p / q), as exactly as the caller has it.

    The sum is of generalised KLs, a log(a / b) - a + b, which cannot cancel; -a + b is 0 in the sum over all classes.
    With ``partial`` it is the bare formula's, a log(a / b), which of some classes may be negative.
    """
    p, q = log_p.exp(), log_q.exp()
    delta = delta.masked_fill((p == 0) & (q == 0), 0)
    if kind == "forward":
        return bregman(delta, q, p) + _excess(p, q, partial), -p
    if kind == "reverse":
        gradient = weighted(q, -delta)
        return bregman(-delta, p, q) + _excess(q, p, partial), gradient + q if partial else gradient
    share = 1 - beta if kind == "skew_reverse" else beta  # of p in m
    mix, m = mixture(delta, share), share * p + (1 - share) * q
    if kind == "jsd":
        value = beta * bregman(mix.log_p, m, p) + (1 - beta) * bregman(mix.log_q, m, q)
        return value, (1 - beta) * weighted(q, mix.log_q)
    if kind == "skew":
        return bregman(mix.log_p, m, p) + _excess(p, m, partial), -(1 - beta) * weighted(q, mix.log_p.exp())
    slope = mix.log_q + (1 - beta) * mix.log_p.exp()
    return bregman(mix.log_q, m, q) + _excess(q, m, partial), weighted(q, slope)


def _excess(a: Tensor, b: Tensor, partial: bool) -> Tensor | float:
    return (a - b).sum(1, keepdim=True) if partial else 0.0
