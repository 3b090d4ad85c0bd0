"""Products and cosines of rows in Triton: one launch forward, with the norms in it, and one per side backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import dot, launch, matmul_precision, power_of_2, split_precision, store

COSINE_EPS = tl.constexpr(1e-8)
LIMIT = tl.constexpr(1e8)  # the inverse norm of a row that is under the eps


@triton.jit
def _inverse(squares):
    norm = tl.sqrt(squares)
    inverse = tl.where(norm <= COSINE_EPS, LIMIT, 1.0 / norm)
    return tl.where(squares == float("inf"), float("nan"), inverse)  # its 0 would be taken for a cosine


@triton.jit
def products_kernel(
    a,  # [N, D]
    b,  # [M, D]
    out,  # [N, M]: products, or cosines
    out_a,  # [N]: squared norms, or inverse norms
    out_b,  # [M]
    N,
    M,
    D,
    a_strides,
    b_strides,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    MIXED: tl.constexpr,  # a and b differ in dtype
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A B^T and the rows' squares, which every tile makes from the numbers that it reads anyway; or what follows."""
    pid = tl.program_id(0)
    side = tl.maximum(tl.cdiv(M, BLOCK), 1)
    i = (pid // side) * BLOCK + tl.arange(0, BLOCK)
    j = (pid % side) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    square_a = tl.zeros([BLOCK], tl.float32)
    square_b = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = (start + d)[None, :].to(tl.int64)
        inside = column < D
        x = tl.load(
            a + i[:, None].to(tl.int64) * a_strides[0] + column * a_strides[1],
            mask=(i < N)[:, None] & inside,
            other=0.0,
        )
        y = tl.load(
            b + j[:, None].to(tl.int64) * b_strides[0] + column * b_strides[1],
            mask=(j < M)[:, None] & inside,
            other=0.0,
        )
        x32, y32 = x.to(tl.float32), y.to(tl.float32)
        square_a += tl.sum(x32 * x32, 1)
        square_b += tl.sum(y32 * y32, 1)
        if MIXED:
            acc = dot(x32, tl.trans(y32), acc, PRECISION)
        else:
            acc = dot(x, tl.trans(y), acc, PRECISION)
    if COSINE:
        square_a, square_b = _inverse(square_a), _inverse(square_b)
        acc = acc * square_a[:, None] * square_b[None, :]
    at = i[:, None].to(tl.int64) * M + j[None, :]
    tl.store(out + at, acc, mask=(i < N)[:, None] & (j < M)[None, :])
    if pid % side == 0:
        tl.store(out_a + i, square_a, mask=i < N)
    if pid // side == 0:
        tl.store(out_b + j, square_b, mask=j < M)


@triton.jit
def cosine_gradient_kernel(
    grad,  # [N, M]
    similarity,  # [N, M]
    a,  # [N, D]
    b,  # [M, D]
    inverse_a,  # [N]
    inverse_b,  # [M]
    out,  # [N, D], contiguous
    N,
    M,
    D,
    grad_strides,
    similarity_strides,
    a_strides,
    b_strides,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """da = (dS b^ - rowsum(dS * S) a^) / |a|, a^ = a / |a|. For db, a and b and both axes of dS and S change places."""
    pid = tl.program_id(0)
    side = tl.cdiv(D, BLOCK_D)
    i = (pid // side) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = (pid % side) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows, column = i[:, None].to(tl.int64), d[None, :].to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    inner = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, M, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        mask = (i < N)[:, None] & (j < M)[None, :]
        ds = tl.load(grad + rows * grad_strides[0] + j[None, :].to(tl.int64) * grad_strides[1], mask=mask, other=0.0)
        s = tl.load(
            similarity + rows * similarity_strides[0] + j[None, :].to(tl.int64) * similarity_strides[1],
            mask=mask,
            other=0.0,
        )
        over_b = tl.load(inverse_b + j, mask=j < M, other=0.0)
        y = tl.load(
            b + j[:, None].to(tl.int64) * b_strides[0] + column * b_strides[1],
            mask=(j < M)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        inner += tl.sum(ds * s, 1)
        acc = dot(ds * over_b[None, :], y.to(tl.float32), acc, PRECISION)
    over_a = tl.load(inverse_a + i, mask=i < N, other=0.0)
    mask = (i < N)[:, None] & (d < D)[None, :]
    x = tl.load(a + rows * a_strides[0] + column * a_strides[1], mask=mask, other=0.0).to(tl.float32)
    inner = tl.where(over_a >= LIMIT, 0.0, inner)  # below the eps the norm is a constant
    store(out + rows * D + column, (acc - inner[:, None] * (x * over_a[:, None])) * over_a[:, None], mask)


def products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _products(a, b, cosine=False)


def cosine_forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _products(a, b, cosine=True)


def _products(a: Tensor, b: Tensor, cosine: bool) -> tuple[Tensor, Tensor, Tensor]:
    (n, d), m = a.shape, b.shape[0]
    float32: dict[str, Any] = {"dtype": torch.float32, "device": a.device}
    out, out_a, out_b = (torch.empty(shape, **float32) for shape in ((n, m), (n,), (m,)))
    block = power_of_2(max(n, m), 16, 64 if n * m > 256 * 256 else 32)
    launch(
        products_kernel,
        # one tile of either side is empty where that side is, and the other's norms are wanted all the same
        triton.cdiv(max(n, 1), block) * triton.cdiv(max(m, 1), block),
        a.device,
        a,
        b,
        out,
        out_a,
        out_b,
        n,
        m,
        d,
        a.stride(),
        b.stride(),
        COSINE=cosine,
        PRECISION=matmul_precision(a, b),
        MIXED=a.dtype != b.dtype,
        BLOCK=block,
        BLOCK_D=32 if a.dtype == torch.float32 else 64,
        num_warps=8 if block == 64 else 4,
    )
    return out, out_a, out_b


def cosine_backward(
    grad: Tensor, a: Tensor, b: Tensor, similarity: Tensor, inverse_a: Tensor, inverse_b: Tensor
) -> tuple[Tensor, Tensor]:
    sides = (
        (grad, similarity, a, b, inverse_a, inverse_b),
        (grad.t(), similarity.t(), b, a, inverse_b, inverse_a),
    )
    gradients = []
    for ds, s, x, y, over_x, over_y in sides:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        gradients.append(out)
        if x.numel() == 0:
            continue
        (n, d), m = x.shape, y.shape[0]
        block_n, block_d = power_of_2(n, 16, 32), power_of_2(d, 16, 64)
        launch(
            cosine_gradient_kernel,
            triton.cdiv(n, block_n) * triton.cdiv(d, block_d),
            x.device,
            ds,
            s,
            x,
            y,
            over_x,
            over_y,
            out,
            n,
            m,
            d,
            ds.stride(),
            s.stride(),
            x.stride(),
            y.stride(),
            PRECISION=split_precision(y),
            BLOCK_N=block_n,
            BLOCK_M=32,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return gradients[0], gradients[1]
