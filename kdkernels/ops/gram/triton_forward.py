"""The forward kernels of sp_gram. Notation: Q (B, D) features, K = Q Q^T, G = K with normalised rows, n their norms.

Three launches: split products over D into a workspace; per row of K its norms, its loss and R . G; then the losses'
sums and the gradient matrix, elementwise, for which K's symmetry gives H^T without a transpose. R = dloss/dG_s,
H = dloss/dK_s, and the gradient matrix is H + H^T.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import dot, find, pick

TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _above_diagonal(tile, side):
    """Row and column of a tile, counted row by row: row i has the side - i tiles from the diagonal on."""
    i, j, width = tile * 0, tile, side
    while j >= width:
        j -= width
        width -= 1
        i += 1
    return i, i + j


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
    item = find(starts, pid)
    local = pid - pick(starts, item)
    split = local // tiles
    tile = local % tiles
    i, j = tile * 0, tile
    if not ONE_TILE:
        i, j = _above_diagonal(tile, tl.cdiv(B, BLOCK_B))
    D = pick(lengths, item)
    span = pick(spans, item)
    stride_d = 1 if UNIT else pick(strides_d, item).to(tl.int64)
    rows_i = i * BLOCK_B + tl.arange(0, BLOCK_B)
    rows_j = j * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    base = pick(features, item)
    stride_b = pick(strides_b, item)
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
    out = work + (split * M + pick(matrices, item)).to(tl.int64) * B * B
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
    work,  # [S, 2, L, B, B]: partial K of the students, then of the teachers
    gram,  # [2, L, B, B]: K, written where KEEP
    scalars,  # [5, L, B]: n_s and n_t before the clamp, R . G_s, the row's part of the loss, the layer's scale
    first,  # the first layer of this launch
    scales,  # those of its layers
    L,
    B,
    S,
    eps,
    L1: tl.constexpr,
    KEEP: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one block
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of one layer. Rows longer than a block are summed up again from the splits in each sweep."""
    pid = tl.program_id(0)
    layer, i = first + pid // B, (pid % B).to(tl.int64)
    scale = pick(scales, pid // B)
    at_s = (layer.to(tl.int64) * B + i) * B
    at_t = ((L + layer).to(tl.int64) * B + i) * B
    k_s, k_t = 0.0, 0.0  # the rows, where they are held
    if WHOLE:
        k_s = _row(work + at_s, tl.arange(0, BLOCK), B, 2 * L, S, SPLITS)
        k_t = _row(work + at_t, tl.arange(0, BLOCK), B, 2 * L, S, SPLITS)
    n_s = _norm(work + at_s, gram + at_s, k_s, B, 2 * L, S, L1, KEEP, WHOLE, SPLITS, BLOCK)
    n_t = _norm(work + at_t, gram + at_t, k_t, B, 2 * L, S, L1, KEEP, WHOLE, SPLITS, BLOCK)

    inner = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        g_s = (k_s if WHOLE else _row(work + at_s, cols, B, 2 * L, S, SPLITS)) / clamp(n_s, eps)
        g_t = (k_t if WHOLE else _row(work + at_t, cols, B, 2 * L, S, SPLITS)) / clamp(n_t, eps)
        difference = g_s - g_t
        squares += difference * difference
        inner += 2.0 * scale * difference * g_s
    step = i * 0 + L * B
    out = scalars + layer * B + i
    tl.store(out, n_s)
    tl.store(out + step, n_t)
    tl.store(out + 2 * step, tl.where(n_s < eps, 0.0, tl.sum(inner, 0)))  # below eps the norm is a constant
    tl.store(out + 3 * step, scale * tl.sum(squares, 0))
    tl.store(out + 4 * step, scale)


@triton.jit
def _norm(
    work,
    gram,
    k,
    B,
    M,
    S,
    L1: tl.constexpr,
    KEEP: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The norm of one row of K: of k where the WHOLE row is held, else of what is read."""
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        row = k if WHOLE else _row(work, cols, B, M, S, SPLITS)
        if KEEP:
            tl.store(gram + cols, row, mask=cols < B)
        acc = acc + tl.abs(row) if L1 else tl.maximum(acc, tl.abs(row))
    if L1:
        norm = tl.sum(acc, 0)
    else:  # squares are taken of K / max|K|, so that large features don't overflow
        top = tl.maximum(tl.max(acc, 0), TINY)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, B, BLOCK):
            x = (k if WHOLE else _row(work, start + tl.arange(0, BLOCK), B, M, S, SPLITS)) / top
            squares += x * x
        norm = tl.sqrt(tl.sum(squares, 0)) * top
    return norm


@triton.jit
def clamp(n, eps):
    """max(n, eps), and NaN where n is NaN."""
    return tl.where(n < eps, eps, n)


@triton.jit
def gradient_matrix_kernel(
    gram,  # [2, L, B, B]
    scalars,  # [5, L, B]
    gradient_matrix,  # [L, B, B]
    loss,  # [] or [L]
    losses,  # how many: 1 or L
    L,
    B,
    eps,
    L1: tl.constexpr,
    ZERO_ROW_GRAD: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The losses, in the first programs, and one tile of one gradient matrix in each program behind them."""
    pid = tl.program_id(0)
    if pid < losses:
        count = L * B // losses
        rows = scalars + 3 * L * B + pid * count
        totals = tl.zeros([BLOCK], tl.float32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            totals += tl.load(rows + at, mask=at < count, other=0.0)
        tl.store(loss + pid, tl.sum(totals, 0))
    elif NEED_GRAD:
        _gradient_tile(gram, scalars, gradient_matrix, pid - losses, L, B, eps, L1, ZERO_ROW_GRAD, TILE)


@triton.jit
def _gradient_tile(
    gram,
    scalars,
    gradient_matrix,
    index,
    L,
    B,
    eps,
    L1: tl.constexpr,
    ZERO_ROW_GRAD: tl.constexpr,
    TILE: tl.constexpr,
):
    side = tl.cdiv(B, TILE)
    layer = (index // (side * side)).to(tl.int64)
    tile = index % (side * side)
    i = (tile // side) * TILE + tl.arange(0, TILE)
    j = (tile % side) * TILE + tl.arange(0, TILE)
    at = i[:, None].to(tl.int64) * B + j[None, :]
    mask = (i < B)[:, None] & (j < B)[None, :]
    k_s = tl.load(gram + layer * B * B + at, mask=mask, other=0.0)
    k_t = tl.load(gram + (L + layer) * B * B + at, mask=mask, other=0.0)
    row, step = scalars + layer * B, layer * 0 + L * B
    n_si = tl.load(row + i, mask=i < B, other=1.0)[:, None]
    n_ti = tl.load(row + step + i, mask=i < B, other=1.0)[:, None]
    inner_i = tl.load(row + 2 * step + i, mask=i < B, other=0.0)[:, None]
    n_sj = tl.load(row + j, mask=j < B, other=1.0)[None, :]
    n_tj = tl.load(row + step + j, mask=j < B, other=1.0)[None, :]
    inner_j = tl.load(row + 2 * step + j, mask=j < B, other=0.0)[None, :]
    scale = tl.load(row + 4 * step)
    r_ij = 2.0 * scale * (k_s / clamp(n_si, eps) - k_t / clamp(n_ti, eps))
    r_ji = 2.0 * scale * (k_s / clamp(n_sj, eps) - k_t / clamp(n_tj, eps))  # K is symmetric
    h_ij = _h(k_s, r_ij, n_si, inner_i, eps, L1, ZERO_ROW_GRAD)
    h_ji = _h(k_s, r_ji, n_sj, inner_j, eps, L1, ZERO_ROW_GRAD)
    tl.store(gradient_matrix + layer * B * B + at, h_ij + h_ji, mask=mask)


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
