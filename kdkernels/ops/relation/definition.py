"""relation as on a board: differentiable PyTorch, the oracle of the tests.

RKD (arXiv 1904.05068, eq. 4-8)   w_d mean H(d_s / mean d_s - d_t / mean d_t) + w_a mean H(cos_s - cos_t),   H smooth L1
                                  d_ij = |x_i - x_j|, its mean over i != j
                                  cos_ijk = <e_ij, e_ik>,  e_ij = (x_j - x_i) / |x_j - x_i|
IRG (CVPR 2019, the edges)        mean (d_s / max d_s - d_t / max d_t)^2
PKT (arXiv 1803.10837, eq. 5-7)   mean P_t log((P_t + eps) / (P_s + eps)),  P_ij = k_ij / sum_j k_ij,  k = (cos + 1) / 2
CC  (arXiv 1904.01802, eq. 10)    mean (k(cos_s) - k(cos_t))^2,   k(c) = exp(-2 gamma) sum_p (2 gamma c)^p / p!
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import compute_dtype
from .op import CC, IRG, PKT, RKD, Relations, unpack

CC_EPS = 1e-12  # CC divides a shorter row by that
DIRECTION_EPS = 1e-12  # rows that are closer have no direction


Reduce = Callable[[Tensor], Tensor]


def relation(x: Relations) -> Tensor:
    dtype = compute_dtype(x.student, x.teacher)
    s, t = (a.to(dtype).reshape(len(a), a[0].numel() if len(a) else 0) for a in (x.student, x.teacher.detach()))
    options = unpack(x.name, x.numbers)
    formulas: dict[str, Callable[..., Tensor]] = {"rkd": _rkd, "irg": _irg, "pkt": _pkt, "cc": _cc}
    if len(s) == 0:
        return s.sum()
    return formulas[x.name](s, t, options, torch.sum if x.reduction == "sum" else torch.mean)


def _lengths(x: Tensor, eps: float, squared: bool) -> Tensor:
    squares = (x[None] - x[:, None]).square().sum(2).clamp(min=eps)
    lengths = squares if squared else squares.sqrt()
    return lengths.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)


def _rkd(s: Tensor, t: Tensor, options: RKD, reduce: Reduce) -> Tensor:
    if len(s) == 1:
        return s.sum() * 0
    d_s, d_t = (_lengths(x, options.eps, options.squared) for x in (s, t))
    pairs = len(s) * (len(s) - 1)
    distances = reduce(F.smooth_l1_loss(d_s / (d_s.sum() / pairs), d_t / (d_t.sum() / pairs), reduction="none"))
    angles = reduce(F.smooth_l1_loss(_angles(s), _angles(t), reduction="none"))
    return options.distance_weight * distances + options.angle_weight * angles


def _angles(x: Tensor) -> Tensor:
    difference = x[None] - x[:, None]
    same = difference.detach().norm(dim=2, keepdim=True) < DIRECTION_EPS
    direction = F.normalize(difference.masked_fill(same, 1), dim=2).masked_fill(same, 0)
    return direction @ direction.transpose(1, 2)


def _irg(s: Tensor, t: Tensor, options: IRG, reduce: Reduce) -> Tensor:
    if len(s) == 1:
        return s.sum() * 0
    d_s, d_t = (_lengths(x, options.eps, options.squared) for x in (s, t))
    return reduce((d_s / d_s.max() - d_t / d_t.max()).square())


def _pkt(s: Tensor, t: Tensor, options: PKT, reduce: Reduce) -> Tensor:
    p_s, p_t = (_probabilities(x, options.eps) for x in (s, t))
    return reduce(p_t * ((p_t + options.eps) / (p_s + options.eps)).log())


def _zero_rows(x: Tensor) -> Tensor:
    """They have no direction to normalise, so nothing goes back through that."""
    return (x.detach() == 0).all(1, keepdim=True)


def _probabilities(x: Tensor, eps: float) -> Tensor:
    zero = _zero_rows(x)
    unit = (x / (x.masked_fill(zero, 1).norm(dim=1, keepdim=True) + eps)).masked_fill(zero, 0)
    k = (unit @ unit.t() + 1) / 2
    return k / k.sum(1, keepdim=True)


def _cc(s: Tensor, t: Tensor, options: CC, reduce: Reduce) -> Tensor:
    k_s, k_t = (_kernel(x, options) for x in (s, t))
    return reduce((k_s - k_t).square())


def _kernel(x: Tensor, options: CC) -> Tensor:
    if options.normalize:
        x = F.normalize(x, dim=1, eps=CC_EPS).masked_fill(_zero_rows(x), 0)
    c = x @ x.t()
    if not options.gaussian:
        return c
    powers = [(2 * options.gamma * c) ** p / math.factorial(p) for p in range(options.order + 1)]
    return math.exp(-2 * options.gamma) * torch.stack(powers).sum(0)
