"""The forward kernels of angular_margin: energies, then everything else on the small maps, then a sum.

Notation as in reference.py: per sample, over N = H W pixels, r channel energy, R its norm, q = r / (R + eps),
w = 1 - q, u = cos(m acos q), G = -softplus(s (w - u)); v any of G, u, w; x and y its unit vectors, student's and
teacher's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import aligned, find, pick
from .triton_device import ENERGY_EPS, load_q_w, maps, pixel_offset, region_mask, region_weights, slopes

UNIT_EPS = tl.constexpr(1e-12)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _energy(
    pointer, at, b, n, N, C, stride_b, stride_c, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr
):
    """[BLOCK_N] energies of pixels that follow each other, with as wide loads as N and the strides allow."""
    N = aligned(N, ALIGN)
    pointers = pointer + b.to(tl.int64) * aligned(stride_b, ALIGN) + at[None, :]
    stride = aligned(stride_c, ALIGN)
    acc = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[:, None]
        x = tl.load(pointers + c.to(tl.int64) * stride, mask=(c < C) & (n < N)[None, :], other=0.0).to(tl.float32)
        acc += x * x
    return tl.sum(acc, 0)


@triton.jit
def energy_kernel(
    activations,  # tuple of [B, C, H, W]
    r,  # [2, P]: student and teacher, P all pixels of all layers and samples
    starts,  # the first program of each activation
    offsets,  # where each one's energies begin in r
    channels,
    pixels,  # H W
    widths,
    strides_b,
    strides_c,
    strides_h,
    strides_w,
    LAST: tl.constexpr,  # channels_last
    GENERIC: tl.constexpr,  # rows of a map apart
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """r[b, n] = sum_c A[b, c, n]^2, one program per sample and block of pixels."""
    pid = tl.program_id(0)
    layer = find(starts, pid)
    local = pid - pick(starts, layer)
    N = pick(pixels, layer)
    C = pick(channels, layer)
    blocks = tl.cdiv(N, BLOCK_N)
    b = local // blocks
    n = (local % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pointer = pick(activations, layer)
    stride_b = pick(strides_b, layer)
    stride_c = pick(strides_c, layer)
    if LAST:
        c = tl.arange(0, BLOCK_C)
        pointers = pointer + b.to(tl.int64) * stride_b + pixel_offset(n, 0, 0, 0, C, False)[:, None] + c[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in range(0, C, BLOCK_C):
            x = tl.load(pointers + start, mask=(n < N)[:, None] & (start + c < C)[None, :], other=0.0).to(tl.float32)
            acc += x * x
        energy = tl.sum(acc, 1)
    else:
        at = pixel_offset(n, pick(widths, layer), pick(strides_h, layer), pick(strides_w, layer), 1, GENERIC)
        multiple = N | stride_b | stride_c
        if GENERIC:
            energy = _energy(pointer, at, b, n, N, C, stride_b, stride_c, BLOCK_C, BLOCK_N, 1)
        elif multiple % 8 == 0:
            energy = _energy(pointer, at, b, n, N, C, stride_b, stride_c, BLOCK_C, BLOCK_N, 8)
        elif multiple % 4 == 0:
            energy = _energy(pointer, at, b, n, N, C, stride_b, stride_c, BLOCK_C, BLOCK_N, 4)
        else:
            energy = _energy(pointer, at, b, n, N, C, stride_b, stride_c, BLOCK_C, BLOCK_N, 1)
    tl.store(r + pick(offsets, layer) + b.to(tl.int64) * N + n, energy, mask=n < N)


@triton.jit
def _norm(r, at, N, BLOCK: tl.constexpr):
    """R, by way of r / max r: squares of large energies overflow fp32."""
    n = tl.arange(0, BLOCK)
    tops = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        tops = tl.maximum(tops, tl.load(r + at + start + n, mask=start + n < N, other=0.0))
    top = tl.maximum(tl.max(tops, 0), TINY)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        x = tl.load(r + at + start + n, mask=start + n < N, other=0.0) / top
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, 0)) * top
    return tl.where(norm > 0, tl.maximum(norm, top), norm)  # no rounding may make it less than the largest energy


@triton.jit
def _unit_difference(v_s, v_t, length_s, length_t):
    """[REGIONS, K] x and D = x - y"""
    x = v_s[None, :] / length_s[:, None]
    return x, x - v_t[None, :] / length_t[:, None]


@triton.jit
def _square(v, mask):
    return tl.sum(tl.where(mask, (v * v)[None, :], 0.0), 1)


@triton.jit
def _length(squares):
    return tl.maximum(tl.sqrt(squares), UNIT_EPS)


@triton.jit
def _gap(v_s, v_t, length_s, length_t, mask):
    """[REGIONS] one block's part of e = ||D||^2"""
    _, d = _unit_difference(v_s, v_t, length_s, length_t)
    return tl.sum(tl.where(mask, d * d, 0.0), 1)


@triton.jit
def _along(e, squares_s, squares_t):
    """[REGIONS] <x, D>: e / 2 for unit vectors. Under the clamp (a region of one bright pixel) a vector is shorter
    than 1, and the student's norm is a constant."""
    of_1 = tl.minimum(tl.sqrt(squares_t) / UNIT_EPS, 1.0)
    return tl.where(tl.sqrt(squares_s) < UNIT_EPS, 0.0, 0.5 * (e + 1.0 - of_1 * of_1))


@triton.jit
def _pull(v_s, v_t, length_s, length_t, along, c, mask):
    """[K] dL/dv = sum over regions of (2c / ||v||) (D - <x, D> x)"""
    x, d = _unit_difference(v_s, v_t, length_s, length_t)
    factor = (2.0 * c / length_s)[:, None]
    return tl.sum(tl.where(mask, factor * (d - along[:, None] * x), 0.0), 0)


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
    weights,  # of the layers
    layers,  # which layer each one is
    margin,
    scale,
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
    N = height * width
    at = pick(offsets, layer) + b.to(tl.int64) * N
    norm_s = _norm(r, at, N, BLOCK)
    norm_t = _norm(r + P, at, N, BLOCK)

    G_s2 = tl.zeros([REGIONS], tl.float32)
    G_t2 = tl.zeros([REGIONS], tl.float32)
    u_s2 = tl.zeros([REGIONS], tl.float32)
    u_t2 = tl.zeros([REGIONS], tl.float32)
    w_s2 = tl.zeros([REGIONS], tl.float32)
    w_t2 = tl.zeros([REGIONS], tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        mask = region_mask(n, N, width, height, REGIONS)
        q_s, w_s = load_q_w(r, at + n, n < N, norm_s)
        q_t, w_t = load_q_w(r + P, at + n, n < N, norm_t)
        G_s, u_s = maps(q_s, w_s, margin, scale)
        G_t, u_t = maps(q_t, w_t, margin, scale)
        G_s2 += _square(G_s, mask)
        G_t2 += _square(G_t, mask)
        u_s2 += _square(u_s, mask)
        u_t2 += _square(u_t, mask)
        w_s2 += _square(w_s, mask)
        w_t2 += _square(w_t, mask)
    G_ls, G_lt = _length(G_s2), _length(G_t2)
    u_ls, u_lt = _length(u_s2), _length(u_t2)
    w_ls, w_lt = _length(w_s2), _length(w_t2)

    G_e = tl.zeros([REGIONS], tl.float32)
    u_e = tl.zeros([REGIONS], tl.float32)
    w_e = tl.zeros([REGIONS], tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        mask = region_mask(n, N, width, height, REGIONS)
        q_s, w_s = load_q_w(r, at + n, n < N, norm_s)
        q_t, w_t = load_q_w(r + P, at + n, n < N, norm_t)
        G_s, u_s = maps(q_s, w_s, margin, scale)
        G_t, u_t = maps(q_t, w_t, margin, scale)
        G_e += _gap(G_s, G_t, G_ls, G_lt, mask)
        u_e += _gap(u_s, u_t, u_ls, u_lt, mask)
        w_e += _gap(w_s, w_t, w_ls, w_lt, mask)
    c = region_weights(width, height, pick(weights, layer), local_weight, B, REGIONS)
    tl.store(losses + pick(layers, layer) * B + b, tl.sum(c * (G_e + u_e + w_e), 0))

    if NEED_GRAD:
        G_a = _along(G_e, G_s2, G_t2)
        u_a = _along(u_e, u_s2, u_t2)
        w_a = _along(w_e, w_s2, w_t2)
        inner = tl.zeros([BLOCK], tl.float32)
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)
            mask = region_mask(n, N, width, height, REGIONS)
            q_s, w_s = load_q_w(r, at + n, n < N, norm_s)
            q_t, w_t = load_q_w(r + P, at + n, n < N, norm_t)
            G_s, u_s = maps(q_s, w_s, margin, scale)
            G_t, u_t = maps(q_t, w_t, margin, scale)
            dG, du = slopes(q_s, u_s, w_s, margin, scale)
            h = _pull(G_s, G_t, G_ls, G_lt, G_a, c, mask) * dG
            h += _pull(u_s, u_t, u_ls, u_lt, u_a, c, mask) * du
            h -= _pull(w_s, w_t, w_ls, w_lt, w_a, c, mask)
            inner += h * q_s
            tl.store(kappa + at + n, h, mask=n < N)
        total = tl.sum(inner, 0)
        tl.debug_barrier()  # the sweep below may read what another thread of this program wrote
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)
            h = tl.load(kappa + at + n, mask=n < N, other=0.0)
            r_s = tl.load(r + at + n, mask=n < N, other=0.0)
            direction = tl.where(norm_s == 0, 0.0, r_s / tl.where(norm_s == 0, 1.0, norm_s))  # r / R; 0 on a dead map
            tl.store(kappa + at + n, 2.0 * (h - total * direction) / (norm_s + ENERGY_EPS), mask=n < N)


@triton.jit
def sum_kernel(
    losses,  # [L, B]
    loss,  # [programs]
    count,  # numbers per program
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    totals = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        totals += tl.load(losses + pid * count + at, mask=at < count, other=0.0)
    tl.store(loss + pid, tl.sum(totals, 0))
