"""The forward kernels of sp_gram. Notation: Q (B, D) features, K = Q Q^T, G = K with normalised rows, n their norms.

Three launches: split products over D into a workspace; per row of K its norms, its loss and R . G; then W elementwise,
for which K's symmetry gives H^T without a transpose.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import dot, find, pick

TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def product_kernel(
    features,  # tuple of [B, D]
    work,  # [S, M, B, B]: partial products; M matrices, S splits of D
    starts,  # the first program of each matrix
    matrices,  # where each one is in work
    B,
    M,
    tiles,  # pairs of row blocks, those below the diagonal left out
    lengths,  # D
    spans,  # columns per split, a multiple of BLOCK_D
    strides_b,
    strides_d,
    UNIT: tl.constexpr,  # stride_d is 1
    ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of one split of one K. Only tiles on and above the diagonal are made; the others are their mirrors."""
    pid = tl.program_id(0)
    layer = find(starts, pid)
    local = pid - pick(starts, layer)
    split = local // tiles
    tile = local % tiles
    i = tile * 0
    j = tile
    if not ONE_TILE:
        row_blocks = tl.cdiv(B, BLOCK_B)
        width = row_blocks
        while j >= width:  # row i of the triangle has row_blocks - i tiles
            j -= width
            width -= 1
            i += 1
        j += i
    D = pick(lengths, layer)
    span = pick(spans, layer)
    stride_d = 1 if UNIT else pick(strides_d, layer).to(tl.int64)
    rows_i = i * BLOCK_B + tl.arange(0, BLOCK_B)
    rows_j = j * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    base = pick(features, layer)
    stride_b = pick(strides_b, layer)
    pointers_i = base + rows_i[:, None].to(tl.int64) * stride_b
    pointers_j = base + rows_j[:, None].to(tl.int64) * stride_b
    acc = tl.zeros([BLOCK_B, BLOCK_B], tl.float32)
    for start in range(split * span, tl.minimum(D, split * span + span), BLOCK_D):
        column = (start + d)[None, :] * stride_d
        inside = (start + d < D)[None, :]
        x = tl.load(pointers_i + column, mask=(rows_i < B)[:, None] & inside, other=0.0)
        if ONE_TILE:
            acc = dot(x, tl.trans(x), acc, PRECISION)
        else:
            y = tl.load(pointers_j + column, mask=(rows_j < B)[:, None] & inside, other=0.0)
            acc = dot(x, tl.trans(y), acc, PRECISION)
    row, col = rows_i[:, None], rows_j[None, :]
    mask = (row < B) & (col < B)
    out = work + (split * M + pick(matrices, layer)).to(tl.int64) * B * B
    tl.store(out + row.to(tl.int64) * B + col, acc, mask=mask)
    if not ONE_TILE:  # noqa: SIM102
        if i != j:
            tl.store(out + col.to(tl.int64) * B + row, acc, mask=mask)


@triton.jit
def _row(work, cols, B, M, S, SPLITS: tl.constexpr):
    """[K] one row of K: the splits added up, SPLITS of them per step."""
    step = tl.arange(0, SPLITS)[:, None]
    acc = tl.zeros([SPLITS, cols.shape[0]], tl.float32)
    for start in range(0, S, SPLITS):
        at = (start + step).to(tl.int64) * M * B * B + cols[None, :]
        acc += tl.load(work + at, mask=(start + step < S) & (cols < B)[None, :], other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def rows_kernel(
    work,  # [S, 2 L, B, B]: partial K of student and teacher, layer by layer
    gram,  # [2 L, B, B]: K, written where KEEP
    scalars,  # [L, 4, B]: n_s and n_t before the clamp, R . G_s, the row's share of the loss over scale
    B,
    M,  # 2 L
    S,
    scale,
    eps,
    L1: tl.constexpr,
    KEEP: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one block
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of one layer. Rows longer than a block are summed up again from the splits in each sweep."""
    pid = tl.program_id(0)
    layer, i = pid // B, (pid % B).to(tl.int64)
    matrix = (2 * layer).to(tl.int64)
    at_s, at_t = (matrix * B + i) * B, (matrix * B + B + i) * B
    work_s, work_t = work + at_s, work + at_t
    if WHOLE:
        k_s = _row(work_s, tl.arange(0, BLOCK), B, M, S, SPLITS)
        k_t = _row(work_t, tl.arange(0, BLOCK), B, M, S, SPLITS)

    top_s = tl.zeros([BLOCK], tl.float32)
    top_t = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        if not WHOLE:
            k_s = _row(work_s, cols, B, M, S, SPLITS)
            k_t = _row(work_t, cols, B, M, S, SPLITS)
        if KEEP:
            tl.store(gram + at_s + cols, k_s, mask=cols < B)
            tl.store(gram + at_t + cols, k_t, mask=cols < B)
        if L1:
            top_s += tl.abs(k_s)
            top_t += tl.abs(k_t)
        else:
            top_s = tl.maximum(top_s, tl.abs(k_s))
            top_t = tl.maximum(top_t, tl.abs(k_t))
    if L1:
        n_s = tl.sum(top_s, 0)
        n_t = tl.sum(top_t, 0)
    else:  # squares are taken of K / max|K|, so that large features don't overflow
        max_s = tl.maximum(tl.max(top_s, 0), TINY)
        max_t = tl.maximum(tl.max(top_t, 0), TINY)
        square_s = tl.zeros([BLOCK], tl.float32)
        square_t = tl.zeros([BLOCK], tl.float32)
        for start in range(0, B, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            if not WHOLE:
                k_s = _row(work_s, cols, B, M, S, SPLITS)
                k_t = _row(work_t, cols, B, M, S, SPLITS)
            x_s = k_s / max_s
            x_t = k_t / max_t
            square_s += x_s * x_s
            square_t += x_t * x_t
        n_s = tl.sqrt(tl.sum(square_s, 0)) * max_s
        n_t = tl.sqrt(tl.sum(square_t, 0)) * max_t

    inner = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        if not WHOLE:
            k_s = _row(work_s, cols, B, M, S, SPLITS)
            k_t = _row(work_t, cols, B, M, S, SPLITS)
        g_s = k_s / clamp(n_s, eps)
        g_t = k_t / clamp(n_t, eps)
        difference = g_s - g_t
        squares += difference * difference
        inner += 2.0 * scale * difference * g_s
    out = scalars + (4 * layer).to(tl.int64) * B + i
    tl.store(out, n_s)
    tl.store(out + B, n_t)
    tl.store(out + 2 * B, tl.where(n_s < eps, 0.0, tl.sum(inner, 0)))  # below eps the norm is a constant
    tl.store(out + 3 * B, tl.sum(squares, 0))


@triton.jit
def clamp(n, eps):
    """max(n, eps), and NaN where n is NaN."""
    return tl.where(n < eps, eps, n)


@triton.jit
def _h(k_s, r, n, inner, eps, L1: tl.constexpr, ZERO_ROW_GRAD: tl.constexpr):
    """H_ij = (R_ij - (R_i . G_i) G_ij) / n_i, or with the sign of K in place of the second G"""
    clamped = clamp(n, eps)
    if L1:
        direction = (k_s > 0).to(tl.float32) - (k_s < 0).to(tl.float32)
    else:
        direction = k_s / clamped
    h = (r - inner * direction) / clamped
    return h if ZERO_ROW_GRAD else tl.where(n == 0, 0.0, h)  # an all-zero row has no direction to normalise


@triton.jit
def weights_kernel(
    gram,  # [2 L, B, B]
    scalars,  # [L, 4, B]
    weights,  # [L, B, B]: W = H + H^T
    loss,  # []
    L,
    B,
    scale,
    eps,
    L1: tl.constexpr,
    ZERO_ROW_GRAD: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of one W, and in one more program, the first, the loss."""
    pid = tl.program_id(0)
    if pid == 0:
        totals = tl.zeros([BLOCK], tl.float32)
        for start in range(0, L * B, BLOCK):
            at = start + tl.arange(0, BLOCK)
            layer = (at // B).to(tl.int64)
            totals += tl.load(scalars + (4 * layer + 3) * B + at % B, mask=at < L * B, other=0.0)
        tl.store(loss, scale * tl.sum(totals, 0))
    elif NEED_GRAD:
        side = tl.cdiv(B, TILE)
        layer = ((pid - 1) // (side * side)).to(tl.int64)
        tile = (pid - 1) % (side * side)
        i = (tile // side) * TILE + tl.arange(0, TILE)
        j = (tile % side) * TILE + tl.arange(0, TILE)
        at = i[:, None].to(tl.int64) * B + j[None, :]
        mask = (i < B)[:, None] & (j < B)[None, :]
        k_s = tl.load(gram + 2 * layer * B * B + at, mask=mask, other=0.0)
        k_t = tl.load(gram + (2 * layer + 1) * B * B + at, mask=mask, other=0.0)
        row = scalars + 4 * layer * B
        n_si = tl.load(row + i, mask=i < B, other=1.0)[:, None]
        n_ti = tl.load(row + B + i, mask=i < B, other=1.0)[:, None]
        inner_i = tl.load(row + 2 * B + i, mask=i < B, other=0.0)[:, None]
        n_sj = tl.load(row + j, mask=j < B, other=1.0)[None, :]
        n_tj = tl.load(row + B + j, mask=j < B, other=1.0)[None, :]
        inner_j = tl.load(row + 2 * B + j, mask=j < B, other=0.0)[None, :]
        r_ij = 2.0 * scale * (k_s / clamp(n_si, eps) - k_t / clamp(n_ti, eps))
        r_ji = 2.0 * scale * (k_s / clamp(n_sj, eps) - k_t / clamp(n_tj, eps))  # K is symmetric
        h_ij = _h(k_s, r_ij, n_si, inner_i, eps, L1, ZERO_ROW_GRAD)
        h_ji = _h(k_s, r_ji, n_sj, inner_j, eps, L1, ZERO_ROW_GRAD)
        tl.store(weights + layer * B * B + at, h_ij + h_ji, mask=mask)
