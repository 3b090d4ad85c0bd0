"""The forward kernels of energy: channel sums of squares, then the distance of two unit maps, then a sum.

Notation: per sample, over N = H W pixels, r channel energy, R its norm, u = r / R, D = u_s - u_t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import aligned, find, pick

UNIT_EPS = tl.constexpr(1e-12)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def pixel_offset(n, width, stride_h, stride_w, stride_pixel, GENERIC: tl.constexpr):
    """Where pixel n of a map is: pixels follow each other, or each row has a place of its own."""
    if GENERIC:
        return (n // width).to(tl.int64) * stride_h + (n % width).to(tl.int64) * stride_w
    return n.to(tl.int64) * stride_pixel


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
def norm_of(r, at, N, BLOCK: tl.constexpr):
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
def attention_kernel(
    r,  # [2, P]: energies of student and teacher
    kappa,  # [P]: dloss/dA[c, n] = kappa[n] A[c, n]
    losses,  # [L, B]
    P,
    B,
    offsets,  # where each layer begins in r and kappa
    pixels,  # H W
    channels_s,  # 1 or more
    channels_t,
    factors,  # what each layer's loss of a sample is multiplied by
    layers,  # which layer each one is
    ABSOLUTE: tl.constexpr,  # |D| instead of D^2
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per layer and sample."""
    pid = tl.program_id(0)
    layer = pid // B
    b = pid % B
    N = pick(pixels, layer)
    at = pick(offsets, layer) + b.to(tl.int64) * N
    # the eps is for the energies' mean over the channels
    eps_s = UNIT_EPS * pick(channels_s, layer).to(tl.float32)
    eps_t = UNIT_EPS * pick(channels_t, layer).to(tl.float32)
    norm_s = norm_of(r, at, N, BLOCK)
    norm_t = norm_of(r + P, at, N, BLOCK)
    length_s = tl.where(norm_s < eps_s, eps_s, norm_s)
    length_t = tl.where(norm_t < eps_t, eps_t, norm_t)
    c = pick(factors, layer) / N
    gaps = tl.zeros([BLOCK], tl.float32)
    inners = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        u, d = _difference(r, P, at + n, n < N, length_s, length_t)
        gaps += tl.abs(d) if ABSOLUTE else d * d
        inners += _sign(d) * u
    e = tl.sum(gaps, 0)
    tl.store(losses + pick(layers, layer) * B + b, c * e)
    if NEED_GRAD:
        if ABSOLUTE:
            inner = tl.sum(inners, 0)
        else:  # 2 <u_s, D> is e for unit vectors; a map under the eps is shorter than 1
            of_1 = tl.minimum(norm_t / eps_t, 1.0)
            inner = e + 1.0 - of_1 * of_1
        inner = tl.where(norm_s < eps_s, 0.0, inner)  # whose length is a constant
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)
            u, d = _difference(r, P, at + n, n < N, length_s, length_t)
            pull = _sign(d) if ABSOLUTE else 2.0 * d
            tl.store(kappa + at + n, (pull - inner * u) * (2.0 * c / length_s), mask=n < N)


@triton.jit
def _difference(r, P, at, mask, length_s, length_t):
    """[BLOCK] u_s and D"""
    u = tl.load(r + at, mask=mask, other=0.0) / length_s
    return u, u - tl.load(r + P + at, mask=mask, other=0.0) / length_t


@triton.jit
def _sign(d):
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))  # NaN stays NaN


@triton.jit
def sum_kernel(
    losses,  # [L, B]
    loss,  # [programs]
    count,  # numbers per program
    between,  # where one program's numbers begin after another's
    stride,  # of a program's numbers
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    totals = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        totals += tl.load(losses + pid * between + at * stride, mask=at < count, other=0.0)
    tl.store(loss + pid, tl.sum(totals, 0))
