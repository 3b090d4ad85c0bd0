"""The forward kernel of angular_margin behind the energies: everything on the small maps.

Notation: per sample, over N = H W pixels, r channel energy, R its norm, q = r / (R + eps), w = 1 - q,
u = cos(m acos q), G = -softplus(s (w - u)); v any of G, u, w; x and y its unit vectors, student's and teacher's;
c a region's weight. [REGIONS] is one number for the whole map, and with a local weight one for each of its quadrants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..energy.triton_forward import UNIT_EPS, norm_of
from ..triton_common import pick
from .triton_device import ENERGY_EPS, Maps, load_q_w, maps, region_mask, region_weights, slopes


class Sample(NamedTuple):
    """Both networks' energies of one sample, and what makes maps of them."""

    r_s: Any  # pointers
    r_t: Any
    norm_s: Any
    norm_t: Any
    height: Any
    width: Any
    margin: Any
    sharpness: Any


@triton.jit
def maps_kernel(
    r,  # [2, P]: energies of student and teacher
    kappa,  # [P]: dloss/dA[c, n] = kappa[n] A[c, n]
    losses,  # [L, B]
    P,
    B,
    offsets,  # where each layer begins in r and kappa
    heights,
    widths,
    factors,  # what each layer's loss of a sample is multiplied by
    layers,  # which layer each one is
    margin,
    sharpness,
    local_weight,
    REGIONS: tl.constexpr,  # 1, or 8 (5 in use) with quadrants
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per layer and sample. The maps are made again from r in each sweep: they cost less than to keep."""
    pid = tl.program_id(0)
    layer = pid // B
    b = pid % B
    height = pick(heights, layer)
    width = pick(widths, layer)
    at = pick(offsets, layer) + b.to(tl.int64) * (height * width)
    norm_s = norm_of(r, at, height * width, BLOCK)
    norm_t = norm_of(r + P, at, height * width, BLOCK)
    sample = Sample(r + at, r + P + at, norm_s, norm_t, height, width, margin, sharpness)
    squares_s, squares_t = _squares(sample, REGIONS, BLOCK)
    lengths_s, lengths_t = _lengths(squares_s), _lengths(squares_t)
    gaps = _gaps(sample, lengths_s, lengths_t, REGIONS, BLOCK)
    c = region_weights(width, height, pick(factors, layer), local_weight, REGIONS)
    tl.store(losses + pick(layers, layer) * B + b, tl.sum(c * (gaps.G + gaps.u + gaps.w), 0))
    if NEED_GRAD:
        along = Maps(
            _along(gaps.G, squares_s.G, squares_t.G),
            _along(gaps.u, squares_s.u, squares_t.u),
            _along(gaps.w, squares_s.w, squares_t.w),
        )
        _store_kappa(sample, kappa + at, lengths_s, lengths_t, along, c, REGIONS, BLOCK)


@triton.jit
def _load(sample, start, REGIONS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of pixels: which, in which regions, the student's q, and both networks' maps."""
    n = start + tl.arange(0, BLOCK)
    N = sample.height * sample.width
    mask = region_mask(n, N, sample.width, sample.height, REGIONS)
    q_s, w_s = load_q_w(sample.r_s, n, n < N, sample.norm_s)
    q_t, w_t = load_q_w(sample.r_t, n, n < N, sample.norm_t)
    of_s = maps(q_s, w_s, sample.margin, sample.sharpness)
    of_t = maps(q_t, w_t, sample.margin, sample.sharpness)
    return n, mask, q_s, of_s, of_t


@triton.jit
def _squares(sample, REGIONS: tl.constexpr, BLOCK: tl.constexpr):
    """[REGIONS] ||v||^2 of both networks' maps."""
    zero = tl.zeros([REGIONS], tl.float32)
    squares_s, squares_t = Maps(zero, zero, zero), Maps(zero, zero, zero)
    for start in range(0, sample.height * sample.width, BLOCK):
        _, mask, _, of_s, of_t = _load(sample, start, REGIONS, BLOCK)
        squares_s = _add_squares(squares_s, of_s, mask)
        squares_t = _add_squares(squares_t, of_t, mask)
    return squares_s, squares_t


@triton.jit
def _add_squares(squares, of, mask):
    return Maps(squares.G + _square(of.G, mask), squares.u + _square(of.u, mask), squares.w + _square(of.w, mask))


@triton.jit
def _square(v, mask):
    return tl.sum(tl.where(mask, (v * v)[None, :], 0.0), 1)


@triton.jit
def _lengths(squares):
    return Maps(_length(squares.G), _length(squares.u), _length(squares.w))


@triton.jit
def _length(square):
    return tl.maximum(tl.sqrt(square), UNIT_EPS)


@triton.jit
def _gaps(sample, lengths_s, lengths_t, REGIONS: tl.constexpr, BLOCK: tl.constexpr):
    """[REGIONS] e = ||D||^2 of each map, D = x - y."""
    zero = tl.zeros([REGIONS], tl.float32)
    gaps = Maps(zero, zero, zero)
    for start in range(0, sample.height * sample.width, BLOCK):
        _, mask, _, of_s, of_t = _load(sample, start, REGIONS, BLOCK)
        gaps = Maps(
            gaps.G + _gap(of_s.G, of_t.G, lengths_s.G, lengths_t.G, mask),
            gaps.u + _gap(of_s.u, of_t.u, lengths_s.u, lengths_t.u, mask),
            gaps.w + _gap(of_s.w, of_t.w, lengths_s.w, lengths_t.w, mask),
        )
    return gaps


@triton.jit
def _gap(v_s, v_t, length_s, length_t, mask):
    _, d = _unit_difference(v_s, v_t, length_s, length_t)
    return tl.sum(tl.where(mask, d * d, 0.0), 1)


@triton.jit
def _unit_difference(v_s, v_t, length_s, length_t):
    """[REGIONS, K] x and D"""
    x = v_s[None, :] / length_s[:, None]
    return x, x - v_t[None, :] / length_t[:, None]


@triton.jit
def _along(e, square_s, square_t):
    """[REGIONS] <x, D>: e / 2 for unit vectors. Under the clamp (a region of one bright pixel) a vector is shorter
    than 1, and the student's norm is a constant."""
    of_1 = tl.minimum(tl.sqrt(square_t) / UNIT_EPS, 1.0)
    return tl.where(tl.sqrt(square_s) < UNIT_EPS, 0.0, 0.5 * (e + 1.0 - of_1 * of_1))


@triton.jit
def _store_kappa(sample, kappa, lengths_s, lengths_t, along, c, REGIONS: tl.constexpr, BLOCK: tl.constexpr):
    """dloss/dq, which goes through memory, and from it kappa = (2 / (R + eps)) (dloss/dq - <dloss/dq, q> r / R)."""
    N = sample.height * sample.width
    norm = sample.norm_s
    inner = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        n, mask, q, of_s, of_t = _load(sample, start, REGIONS, BLOCK)
        slope = slopes(q, of_s.u, of_s.w, sample.margin, sample.sharpness)
        dq = _pull(of_s.G, of_t.G, lengths_s.G, lengths_t.G, along.G, c, mask) * slope.G
        dq += _pull(of_s.u, of_t.u, lengths_s.u, lengths_t.u, along.u, c, mask) * slope.u
        dq += _pull(of_s.w, of_t.w, lengths_s.w, lengths_t.w, along.w, c, mask) * slope.w
        inner += dq * q
        tl.store(kappa + n, dq, mask=n < N)
    total = tl.sum(inner, 0)
    tl.debug_barrier()  # the sweep below may read what another thread of this program wrote
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        dq = tl.load(kappa + n, mask=n < N, other=0.0)
        r = tl.load(sample.r_s + n, mask=n < N, other=0.0)
        dead = norm < 1e-30  # or as good as: <h, q> is nothing beside h, and r / R has no digits left
        direction = tl.where(dead, 0.0, r / tl.where(dead, 1.0, norm))
        tl.store(kappa + n, 2.0 * (dq - total * direction) / (norm + ENERGY_EPS), mask=n < N)


@triton.jit
def _pull(v_s, v_t, length_s, length_t, along, c, mask):
    """[K] dloss/dv = sum over regions of (2c / ||v||) (D - <x, D> x)"""
    x, d = _unit_difference(v_s, v_t, length_s, length_t)
    factor = (2.0 * c / length_s)[:, None]
    return tl.sum(tl.where(mask, factor * (d - along[:, None] * x), 0.0), 0)
