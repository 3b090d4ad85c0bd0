"""Device functions of the softmax_kl kernels: tiles of logits, labels, a row's statistics, and the terms of the loss.

[R] is one number per row of a tile, [R, K] one per row and class. Notation: z logits, T temperature, p = softmax(z),
q = softmax(z / T), s student, t teacher, {a, b} a row's labels, S the probability of the non-target classes, which are
all but a and b.

Arguments travel in NamedTuples, which Triton takes apart when it compiles; a None in them is a constant of the kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..triton_common import aligned

NEG_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)


class Strided(NamedTuple):
    """A tensor in memory: (N, C), or (N,)."""

    pointer: Any
    strides: Any


class Has(NamedTuple):
    """What a call has: terms, networks and labels."""

    ce: bool
    kl: bool
    target: bool
    non_target: bool
    decoupled: bool  # one of the two
    soft: bool  # a teacher
    labels: bool  # one or two per row
    mixed: bool  # two
    smooth: bool
    dense: bool  # y (N, C) instead
    divergence: str
    standardize: bool


class Labels(NamedTuple):
    """Those of the call, as in op.py."""

    target: Any  # Strided or None, like the next two
    mixed: Any
    lam: Any
    ignore_index: Any
    smoothing: Any


class Inputs(NamedTuple):
    """What both passes read."""

    student: Any  # Strided [N, C]
    teacher: Any  # Strided [N, C]
    labels: Any  # Labels
    terms: Any  # Terms of op.py: the weights
    inverse_t: Any
    teacher_share: Any  # of the divergence's mixture
    student_share: Any
    N: Any


class RowLabels(NamedTuple):
    """[R] each: the labels, their weights in y, whether the row counts, and whether its labels are classes."""

    a: Any
    b: Any
    weight_a: Any
    weight_b: Any
    keep: Any
    valid: Any


class Softmax(NamedTuple):
    """[R] each: the statistics of one network's rows."""

    top: Any  # max z
    inverse_std: Any  # 1 unless logits are standardised; below they are
    logz_p: Any  # log sum exp(z - top): the student's, for CE, of logits as they are
    logz: Any  # log sum exp((z - top) / T)
    non_target_top: Any  # max z of the non-target classes
    non_target_logz: Any  # log sum exp((z - non_target_top) / T) of those


class Saved(NamedTuple):
    """[R] each: what is saved of both networks together."""

    ratio: Any  # the teacher's logz - the student's
    non_target_ratio: Any  # the same of the non-target classes
    slope: Any  # the mean of the divergence's slopes
    mean: Any  # of the student's standardised logits, relative to the maximum
    lost: Any  # how much of those the gradient loses


@triton.jit
def load_tile(x, rows, cols, C, other, ALIGN: tl.constexpr):
    """[R, K] in fp32, ``other`` behind the last class. Offsets are 64-bit."""
    at = (rows * aligned(x.strides[0], ALIGN))[:, None] + cols[None, :].to(tl.int64) * x.strides[1]
    return tl.load(x.pointer + at, mask=(cols < C)[None, :], other=other).to(tl.float32)


@triton.jit
def load_at(x, rows, classes):
    """[R] the logits of one class per row."""
    return tl.load(x.pointer + rows * x.strides[0] + classes * x.strides[1]).to(tl.float32)


@triton.jit
def load_labels(labels, rows, C, HAS: tl.constexpr):
    """The rows' labels; without labels every row counts, and every class is a non-target one."""
    a = tl.full(rows.shape, -1, tl.int64)
    b = a
    weight_a = tl.full(rows.shape, 1.0, tl.float32)
    keep = a == a
    valid = keep
    if HAS.labels:
        a = tl.load(labels.target.pointer + rows * labels.target.strides[0])
        b = a
        if HAS.mixed:
            b = tl.load(labels.mixed.pointer + rows * labels.mixed.strides[0])
            weight_a = tl.load(labels.lam.pointer + rows * labels.lam.strides[0]).to(tl.float32)
        keep = (a != labels.ignore_index) & (b != labels.ignore_index)
        valid = (a >= 0) & (a < C) & (b >= 0) & (b < C)
        a = tl.where(valid, a, 0)
        b = tl.where(valid, b, 0)
    return RowLabels(a, b, weight_a, 1.0 - weight_a, keep, valid)


@triton.jit
def is_non_target(cols, y):
    """[R, K] whether a class is none of the row's labels."""
    return (cols[None, :] != y.a[:, None]) & (cols[None, :] != y.b[:, None])


@triton.jit
def weighted(weight, value):
    """weight * value, where a weight of 0 means 0 even beside an infinity."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def scaled(z, inverse_std, x, HAS: tl.constexpr):
    """[R, K] or [R] z / T, standardised if that is asked for."""
    if HAS.standardize:
        factor = inverse_std * x.inverse_t
        return z * (factor[:, None] if len(z.shape) == 2 else factor)
    return z * x.inverse_t


@triton.jit
def running(top, total, z, scale):
    """[R, K] maxima by column of the tiles so far, and sums of exp(scale (z - maximum)), with one more tile. They begin
    with LOWEST and 0. One exponential: it is the sum or the new number that shrinks, and the other one stays."""
    d = z - top
    e = tl.exp(-tl.abs(d) * scale[:, None])
    return tl.maximum(top, z), tl.where(d > 0, total * e + 1.0, total + e)


@triton.jit
def joined(top, total, scale):
    """[R] maximum and sum over the columns of the above; a row of -inf has -inf and 0."""
    row = tl.max(top, 1)
    return tl.where(row == LOWEST, NEG_INF, row), tl.sum(total * tl.exp((top - row[:, None]) * scale[:, None]), 1)


@triton.jit
def log_sum(total):
    """log of a sum of exponentials, -inf for an empty one."""
    return tl.where(total == 0, NEG_INF, tl.log(tl.where(total == 0, 1.0, total)))


@triton.jit
def store_stats(stats, rows, inside, N, of_s, of_t, saved, HAS: tl.constexpr):
    """In the order that op.py gives."""
    step = rows * 0 + N  # 64-bit
    tl.store(stats + rows, of_s.top, mask=inside)
    tl.store(stats + step + rows, of_t.top, mask=inside)
    tl.store(stats + 2 * step + rows, of_s.logz_p, mask=inside)
    tl.store(stats + 3 * step + rows, of_s.logz, mask=inside)
    tl.store(stats + 4 * step + rows, saved.ratio, mask=inside)
    stats += 5 * step
    if HAS.decoupled:
        tl.store(stats + rows, of_s.non_target_top, mask=inside)
        tl.store(stats + step + rows, of_t.non_target_top, mask=inside)
        tl.store(stats + 2 * step + rows, of_s.non_target_logz, mask=inside)
        tl.store(stats + 3 * step + rows, saved.non_target_ratio, mask=inside)
        stats += 4 * step
    if HAS.divergence != "forward":
        tl.store(stats + rows, saved.slope, mask=inside)
        stats += step
    if HAS.standardize:
        tl.store(stats + rows, of_s.inverse_std, mask=inside)
        tl.store(stats + step + rows, of_t.inverse_std, mask=inside)
        tl.store(stats + 2 * step + rows, saved.mean, mask=inside)
        tl.store(stats + 3 * step + rows, saved.lost, mask=inside)


@triton.jit
def load_stats(stats, rows, N, HAS: tl.constexpr):
    """What a forward pass stored; the compiler drops the loads whose numbers nobody reads."""
    step = rows * 0 + N
    zero = tl.zeros(rows.shape, tl.float32)
    s_non_target_top, t_non_target_top, s_non_target_logz, t_non_target_logz = zero, zero, zero, zero
    non_target_ratio = zero
    slope, inverse_s, inverse_t, mean, lost = zero, zero, zero, zero, zero
    s_top = tl.load(stats + rows)
    t_top = tl.load(stats + step + rows)
    logz_p = tl.load(stats + 2 * step + rows)
    s_logz = tl.load(stats + 3 * step + rows)
    ratio = tl.load(stats + 4 * step + rows)
    stats += 5 * step
    if HAS.decoupled:
        s_non_target_top = tl.load(stats + rows)
        t_non_target_top = tl.load(stats + step + rows)
        s_non_target_logz = tl.load(stats + 2 * step + rows)
        non_target_ratio = tl.load(stats + 3 * step + rows)
        t_non_target_logz = tl.where(s_non_target_logz == NEG_INF, 0.0, s_non_target_logz) + non_target_ratio
        stats += 4 * step
    if HAS.divergence != "forward":
        slope = tl.load(stats + rows)
        stats += step
    if HAS.standardize:
        inverse_s = tl.load(stats + rows)
        inverse_t = tl.load(stats + step + rows)
        mean = tl.load(stats + 2 * step + rows)
        lost = tl.load(stats + 3 * step + rows)
    of_s = Softmax(s_top, inverse_s, logz_p, s_logz, s_non_target_top, s_non_target_logz)
    of_t = Softmax(t_top, inverse_t, zero, s_logz + ratio, t_non_target_top, t_non_target_logz)
    return of_s, of_t, Saved(ratio, non_target_ratio, slope, mean, lost)


@triton.jit
def non_target_log_q(x, z, of, non_target, HAS: tl.constexpr):
    """[R, K] log of the non-target classes' probabilities renormalised, -inf on the labels and where these have all."""
    inside = non_target & (of.non_target_logz != NEG_INF)[:, None]
    over_t = scaled(z - of.non_target_top[:, None], of.inverse_std, x, HAS)
    return tl.where(inside, over_t - of.non_target_logz[:, None], NEG_INF)


@triton.jit
def kl_term(d, qs, qt):
    """q_t d - q_t + q_s, d = log(q_t / q_s): a class's part of a KL, always positive, so that the sum keeps its digits
    where the networks are close."""
    # d + expm1(-d) by its series
    series = 0.5 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720 - d / 5040))))
    terms = tl.where(tl.abs(d) < 0.25, qt * (d * d) * series, qt * (d - 1.0) + qs)
    return tl.where(qt == 0, qs, terms)
