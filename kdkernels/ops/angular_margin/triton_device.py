"""Device functions of the angular_margin kernel: the maps of one network.

acos, cos and sin are polynomials here: the ranges are small (0 <= q <= 1, 0 <= m theta <= pi), the error is under 3e-7,
and they are the same on every GPU and in the interpreter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..triton_common import log1p

ENERGY_EPS = tl.constexpr(1e-6)
CLAMP = tl.constexpr(1 - 1e-7)
HALF_PI = tl.constexpr(1.5707963267948966)
HALF_PI_HIGH = tl.constexpr(1.5703125)  # exact in fp32, and so is its product with 0, 1 and 2
HALF_PI_LOW = tl.constexpr(4.8382679489661923e-4)


class Maps(NamedTuple):
    """The three maps of a network, or one thing of each."""

    G: Any
    u: Any
    w: Any


@triton.jit
def asin_acos(q):
    """asin(q) and acos(q) for 0 <= q <= 1; near 1 by acos(q) = 2 asin(sqrt((1 - q) / 2)), where 1 - q is exact."""
    near = q > 0.5
    x = tl.where(near, tl.sqrt(tl.where(near, (1.0 - q) * 0.5, 0.0)), q)
    z = x * x
    p = 4.2163199048e-2 * z + 2.4181311049e-2
    p = p * z + 4.5470025998e-2
    p = p * z + 7.4953002686e-2
    p = p * z + 1.6666752422e-1
    asin = p * z * x + x
    return tl.where(near, HALF_PI - 2.0 * asin, asin), tl.where(near, 2.0 * asin, HALF_PI - asin)


@triton.jit
def sincos(x):
    """sin(x) and cos(x) for 0 <= x <= pi, by polynomials within pi/4 of the nearest multiple of pi/2."""
    k = tl.floor(x * (1 / HALF_PI) + 0.5)
    y = (x - k * HALF_PI_HIGH) - k * HALF_PI_LOW
    z = y * y
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * y + y
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    sin = tl.where(k == 0, s, tl.where(k == 1, c, -s))
    cos = tl.where(k == 0, c, tl.where(k == 1, -s, -c))
    return sin, cos


@triton.jit
def maps(q, w, margin, sharpness):
    # cos(m (pi/2 - asin q)): acos has no digits left where q is small, and cos(m pi/2) is 0 for m = 1
    asin, _ = asin_acos(tl.where(q > CLAMP, CLAMP, q))
    sin, cos = sincos(margin * asin)
    rest, sin_at_0 = sincos(tl.abs(1.0 - margin) * HALF_PI)
    u = tl.where(margin <= 1, rest, -rest) * cos + sin_at_0 * sin
    x = sharpness * (w - u)
    return Maps(-(tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))), u, w)


@triton.jit
def slopes(q, u, w, margin, sharpness):
    """Of the maps, by q."""
    _, theta = asin_acos(tl.where(q > CLAMP, CLAMP, q))
    sin, _ = sincos(margin * theta)
    sin_theta = tl.sqrt(w * (1.0 + q))
    du = tl.where(q > CLAMP, 0.0, margin * sin / tl.where(q > CLAMP, 1.0, sin_theta))
    x = sharpness * (w - u)
    e = tl.exp(-tl.abs(x))
    sigmoid = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    return Maps(sharpness * sigmoid * (du + 1.0), du, -1.0)


@triton.jit
def load_q_w(r, n, mask, norm):
    """q and w = 1 - q without its rounding: where one pixel has all the energy, w is eps / (R + eps) and never 0."""
    energy = tl.load(r + n, mask=mask, other=0.0)
    return energy / (norm + ENERGY_EPS), (norm - energy + ENERGY_EPS) / (norm + ENERGY_EPS)


@triton.jit
def region_mask(n, N, width, height, REGIONS: tl.constexpr):
    """[REGIONS, K] whether a pixel is in a region: the whole map, and the quadrants [:h,:w] [:h,w:] [h:,:w] [h:,w:]."""
    inside = (n < N)[None, :]
    if REGIONS == 1:
        return inside
    region = tl.arange(0, REGIONS)[:, None]
    quadrant = 1 + 2 * (n // width >= height // 2).to(tl.int32) + (n % width >= width // 2).to(tl.int32)
    return inside & ((region == 0) | (region == quadrant[None, :]))


@triton.jit
def region_weights(width, height, factor, local_weight, REGIONS: tl.constexpr):
    """[REGIONS] c: the layer's factor times the region's weight, over 3 |region|; 0 beyond the quadrants."""
    region = tl.arange(0, REGIONS)
    h, w = height // 2, width // 2
    rows = tl.where(region <= 2, h, height - h)
    cols = tl.where(region % 2 == 1, w, width - w)
    rows = tl.where(region == 0, height, rows)
    cols = tl.where(region == 0, width, cols)
    share = tl.where(region == 0, 1.0 - local_weight, tl.where(region < 5, local_weight * 0.25, 0.0))
    return factor * share / (3.0 * rows.to(tl.float32) * cols.to(tl.float32))
