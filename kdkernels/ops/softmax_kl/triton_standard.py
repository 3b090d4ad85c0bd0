"""Device functions of softmax_kl for standardised logits: a row's mean and deviation, and what its gradient loses."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .op import STANDARD_EPS
from .triton_device import NEG_INF, load_tile, weighted

EPS = tl.constexpr(STANDARD_EPS)


class Spread(NamedTuple):
    """[R] each: of one network's rows."""

    mean: Any  # relative to the maximum
    std: Any  # unbiased, 0 for a single class
    inverse: Any


class Moments(NamedTuple):
    """[R] each: of rows, or of their chunks so far, relative to the maximum."""

    mean: Any
    squares: Any  # sum of (z - mean)^2


@triton.jit
def moments(z, cols, C, start):
    """Of the tile at ``start``, behind whose last class there may be anything."""
    n = tl.minimum(C - start, z.shape[1]).to(tl.float32)
    inside = (cols < C)[None, :]
    mean = tl.sum(tl.where(inside, z, 0.0), 1) / n
    difference = tl.where(inside, z - mean[:, None], 0.0)
    return Moments(mean, tl.sum(difference * difference, 1))


@triton.jit
def _join(a, b, start, C, BLOCK_C: tl.constexpr):
    """The moments of the first ``start`` classes with those of the next BLOCK_C."""
    n_a = start * 1.0
    n_b = tl.minimum(C - start, BLOCK_C) * 1.0
    share = n_b / (n_a + n_b)
    between = b.mean - a.mean
    return Moments(a.mean + between * share, a.squares + b.squares + between * between * n_a * share)


@triton.jit
def spread(total, C):
    std = tl.sqrt(total.squares / tl.maximum(C - 1, 1))
    return Spread(total.mean, std, 1.0 / (std + EPS))


@triton.jit
def along(gradient, s, of_s, saved):
    """[R] a tile's part of <dL/dz', z'>, s being the student's logits relative to the maximum."""
    return tl.sum(weighted(gradient, s * of_s.inverse_std[:, None] - saved.mean[:, None]), 1)


@triton.jit
def lost(inner, spread, C):
    """[R] d std / dz = (z - mean) / (C - 1) / std, so that much of <dL/dz', z'> is lost."""
    size = spread.std * spread.inverse * tl.maximum(C - 1, 1)
    return tl.where(spread.std == 0, 0.0, inner / tl.where(spread.std == 0, 1.0, size))


@triton.jit
def chunked_spread(logits, rows, C, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    top = tl.full(rows.shape, NEG_INF, tl.float32)
    for start in range(0, C, BLOCK_C):
        top = tl.maximum(top, tl.max(load_tile(logits, rows, start + tl.arange(0, BLOCK_C), C, NEG_INF, ALIGN), 1))
    total = Moments(tl.zeros(rows.shape, tl.float32), tl.zeros(rows.shape, tl.float32))
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        z = load_tile(logits, rows, cols, C, NEG_INF, ALIGN) - top[:, None]
        total = _join(total, moments(z, cols, C, start), start, C, BLOCK_C)
    return spread(total, C)
