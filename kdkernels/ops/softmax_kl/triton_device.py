"""Device functions of the softmax_kl kernels: tiles of logits, labels, online sums, the terms of a row.

[R] is one number per row of a tile, [R, K] one per row and class. Notation as in reference.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import aligned, log1p

NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def load_tile(pointer, rows, cols, strides, C, other, ALIGN: tl.constexpr):
    """[R, K] in fp32, ``other`` behind the last class. Offsets are 64-bit."""
    at = (rows * aligned(strides[0], ALIGN))[:, None] + cols[None, :].to(tl.int64) * strides[1]
    return tl.load(pointer + at, mask=(cols < C)[None, :], other=other).to(tl.float32)


@triton.jit
def load_at(pointer, rows, classes, strides):
    """[R] the logits of one class per row."""
    return tl.load(pointer + rows * strides[0] + classes * strides[1]).to(tl.float32)


@triton.jit
def load_labels(target, target_mixed, lam, rows, strides, C, ignore_index, MIXED: tl.constexpr):
    """[R] a, b, their weights, whether the row counts, and whether its labels are classes."""
    a = tl.load(target + rows * strides[0])
    b = a
    weight_a = tl.full(a.shape, 1.0, tl.float32)
    if MIXED:
        b = tl.load(target_mixed + rows * strides[1])
        weight_a = tl.load(lam + rows * strides[2]).to(tl.float32)
    keep = (a != ignore_index) & (b != ignore_index)
    valid = (a >= 0) & (a < C) & (b >= 0) & (b < C)
    return tl.where(valid, a, 0), tl.where(valid, b, 0), weight_a, 1.0 - weight_a, keep, valid


@triton.jit
def others(cols, a, b):
    """[R, K] whether a class is none of the row's labels."""
    return (cols[None, :] != a[:, None]) & (cols[None, :] != b[:, None])


@triton.jit
def weighted(weight, value):
    """weight * value, where a weight of 0 means 0 even beside an infinity."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def online(top, total, z, scale):
    """[R] maximum of z and sum of exp(scale (z - maximum)) with one more chunk; a row of -inf keeps -inf and 0."""
    new = tl.maximum(top, tl.max(z, 1))
    safe = tl.where(new == NEG_INF, 0.0, new)
    old = total * tl.where(top == NEG_INF, 0.0, tl.exp((top - safe) * scale))
    return new, old + tl.sum(tl.exp((z - safe[:, None]) * scale), 1)


@triton.jit
def log_sum(total):
    """log of a sum of exponentials, -inf for an empty one."""
    return tl.where(total == 0, NEG_INF, tl.log(tl.where(total == 0, 1.0, total)))


@triton.jit
def log_rest(mass, rest_max, rest_logz, logz):
    """[R] log S: log1p of the labelled mass where that is small, else the log-sum over the others."""
    small = mass < 0.5
    return tl.where(small, log1p(-tl.where(small, mass, 0.0)), rest_max + rest_logz - logz)


@triton.jit
def rest_log_q(z, rest_max, rest_logz, mask):
    """[R, K] log of the others' probabilities renormalised, -inf on the labels and where the others have none."""
    inside = mask & (rest_logz != NEG_INF)[:, None]
    return tl.where(inside, z - rest_max[:, None] - rest_logz[:, None], NEG_INF)


@triton.jit
def kl(log_qs, log_qt):
    """[R] sum_k of q_t d - q_t + q_s, d = log(q_t / q_s): the KL as a sum of terms that are all positive, so that
    it keeps its digits where the networks are close."""
    qs = tl.exp(log_qs)
    qt = tl.exp(log_qt)
    d = log_qt - log_qs
    # d + expm1(-d) by its series
    series = 0.5 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720 - d / 5040))))
    terms = tl.where(tl.abs(d) < 0.25, qt * (d * d) * series, qt * (d - 1.0) + qs)
    return tl.sum(tl.where(qt == 0, qs, terms), 1)


@triton.jit
def dense_ce(y, log_p):
    """[R] -sum_k y log p"""
    return -tl.sum(weighted(y, log_p), 1)


@triton.jit
def target_kl(log_qs_a, log_qs_b, log_qt_a, log_qt_b, same, log_ss, log_st):
    """[R] TCKD: sum over the labels of q_t log(q_t / q_s), plus S_t log(S_t / S_s)."""
    at_a = weighted(tl.exp(log_qt_a), log_qt_a - log_qs_a)
    at_b = tl.where(same, 0.0, weighted(tl.exp(log_qt_b), log_qt_b - log_qs_b))
    return weighted(tl.exp(log_st), log_st - log_ss) + at_a + at_b
