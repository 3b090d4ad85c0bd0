"""gram in Triton. sp_gram: three launches forward and one backward, as long as GROUP holds the tensors of each kind.

First the products of all tensors, which `grams` stops at; then, from products or from Gram matrices, the loss.

Sizes: tiles of 16 to 64 rows (128 for batches beyond 256); D is split until there are two programs per multiprocessor,
at most into 64 parts of four blocks or more. The sums have a fixed order everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import grad_like, is_channels_last
from ..triton_common import (
    GROUP,
    device_reason,
    dot,
    find,
    grouped,
    launch,
    matmul_precision,
    pick,
    power_of_2,
    processors,
    split_precision,
    starts_of,
    store,
)
from .op import LayerPairs, SPOptions
from .triton_cosine import cosine_backward, cosine_forward, products
from .triton_forward import gradient_matrix_kernel, product_kernel, rows_kernel

__all__ = [
    "cosine_backward",
    "cosine_forward",
    "grams",
    "products",
    "sp_backward",
    "sp_forward",
    "sp_from_grams",
    "supports",
]
MAX_SPLITS, ROW = 64, 512
SLICE = 4096  # columns that one split sums at most, see reference.py


def supports(*tensors: Tensor) -> str | None:
    return device_reason(*tensors)


@triton.jit
def gradient_kernel(
    features,  # tuple of [B, D]
    gradients,  # tuple of [B, D], rows contiguous
    matrix,  # [L, B, B]
    grad,  # [], or [L]
    grad_stride,
    starts,  # the first program of each layer
    layers,  # which layer each one is
    B,
    lengths,  # D
    strides_b,
    strides_d,
    UNIT: tl.constexpr,  # stride_d is 1
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dQ = grad * matrix Q, one program per block of rows and block of columns."""
    pid = tl.program_id(0)
    item = find(starts, pid)
    local = pid - pick(starts, item)
    row_blocks = tl.cdiv(B, BLOCK_B)
    D = pick(lengths, item)
    stride_b = pick(strides_b, item)
    stride_d = 1 if UNIT else pick(strides_d, item).to(tl.int64)
    i = (local % row_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)  # programs that read the same columns run together
    d = (local // row_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    layer = pick(layers, item).to(tl.int64)
    m = matrix + layer * B * B
    q = pick(features, item) + d[None, :] * stride_d
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for start in range(0, B, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = i[:, None].to(tl.int64) * B + k[None, :]
        left = tl.load(m + at, mask=(i < B)[:, None] & (k < B)[None, :], other=0.0)
        right = tl.load(q + k[:, None].to(tl.int64) * stride_b, mask=(k < B)[:, None] & (d < D)[None, :], other=0.0)
        acc = dot(left, right.to(tl.float32), acc, PRECISION)
    out = pick(gradients, item) + i[:, None].to(tl.int64) * D + d[None, :]
    store(out, acc * tl.load(grad + layer * grad_stride), (i < B)[:, None] & (d < D)[None, :])


class Rows(NamedTuple):
    """A (B, ...) tensor as B rows of D numbers a fixed distance apart, and which one of several it is."""

    x: Tensor
    place: int
    stride_b: int
    stride_d: int
    length: int


def _rows(x: Tensor, place: int, any_order: bool) -> Rows:
    """x without a copy where its numbers lie a fixed distance apart, in its gradient's order or in any order."""
    axes = list(range(1, x.dim()))
    if any_order:  # a Gram matrix does not see the order along D
        axes.sort(key=x.stride, reverse=True)
    elif is_channels_last(x):
        axes = [2, 3, 1]
    length = x[0].numel() if len(x) else 0
    axes = [axis for axis in axes if x.shape[axis] != 1]
    step = x.stride(axes[-1]) if axes else 1
    expected = step
    for axis in reversed(axes):
        if x.stride(axis) != expected or expected == 0:
            return _rows(x.contiguous(), place, any_order)
        expected *= x.shape[axis]
    return Rows(x, place, x.stride(0), step, length)


def _key(item: Rows) -> tuple[Any, ...]:
    return item.x.dtype, item.stride_d == 1


def _arguments(group: list[Rows]) -> dict[str, Any]:
    return {
        "features": tuple(item.x for item in group),
        "lengths": tuple(item.length for item in group),
        "strides_b": tuple(item.stride_b for item in group),
        "strides_d": tuple(item.stride_d for item in group),
        "UNIT": group[0].stride_d == 1,
    }


def _products(tensors: list[Tensor]) -> Tensor:
    """(S, M, B, B): K of each of M (B, ...) tensors, in S parts that are to be added up."""
    device, batch = tensors[0].device, tensors[0].shape[0]
    if batch == 0:
        return torch.empty(1, len(tensors), 0, 0, dtype=torch.float32, device=device)
    items = [_rows(x, i, True) for i, x in enumerate(tensors)]
    float32 = any(item.x.dtype == torch.float32 for item in items)
    block_b = power_of_2(batch, 16, 64 if batch <= 256 or float32 else 128)  # fp32 in 128 x 128 spilt registers
    side = triton.cdiv(batch, block_b)
    tiles = side * (side + 1) // 2
    block_d = 32 if float32 else 64
    longest = max(item.length for item in items)
    wanted = triton.cdiv(2 * processors(device), tiles * len(items))
    splits = max(1, triton.cdiv(longest, SLICE), min(MAX_SPLITS, wanted, longest // (4 * block_d)))
    work = torch.empty(splits, len(items), batch, batch, dtype=torch.float32, device=device)
    for group in grouped(items, _key):
        starts, programs = starts_of([splits * tiles] * len(group))
        launch(
            product_kernel,
            programs,
            device,
            work=work,
            starts=starts,
            matrices=tuple(item.place for item in group),
            B=batch,
            M=len(items),
            tiles=tiles,
            spans=tuple(triton.cdiv(triton.cdiv(item.length, splits), block_d) * block_d for item in group),
            **_arguments(group),
            ONE_TILE=tiles == 1,
            PRECISION=matmul_precision(group[0].x),
            BLOCK_B=block_b,
            BLOCK_D=block_d,
            num_warps=8 if block_b == 128 else 4,
            num_stages=3,
        )
    return work


def grams(features: list[Tensor]) -> Tensor:
    parts = _products(features)
    return parts.sum(0) if len(parts) > 1 else parts[0]


def sp_forward(x: LayerPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
    return _sp(_products([*x.student, *x.teacher]), x.options, need_grad)


def sp_from_grams(grams: Tensor, options: SPOptions, need_grad: bool) -> tuple[Tensor, Tensor]:
    return _sp(grams.contiguous().flatten(0, 1)[None], options, need_grad)


def _sp(parts: Tensor, options: SPOptions, need_grad: bool) -> tuple[Tensor, Tensor]:
    """The loss and the gradient matrices from (S, 2 L, B, B): K of the students, then of the teachers, in S parts."""
    device, (splits, matrices, batch, _), layers = parts.device, parts.shape, len(options.layer_weights)
    float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    gradient_matrix = torch.empty((layers, batch, batch) if need_grad else (0,), **float32)
    shape = (layers,) if options.per_layer else ()
    if batch == 0:
        return torch.zeros(shape, **float32), gradient_matrix
    l1, keep = options.row_norm == "l1", need_grad and splits > 1
    gram = torch.empty(matrices, batch, batch, **float32) if keep else parts
    scalars = torch.empty(5, layers, batch, **float32)
    scales = options.scales(batch)
    for first in range(0, layers, GROUP):
        group = tuple(scales[first : first + GROUP])
        launch(
            rows_kernel,
            len(group) * batch,
            device,
            parts,
            gram,
            scalars,
            first,
            group,
            layers,
            batch,
            splits,
            options.eps,
            L1=l1,
            KEEP=keep,
            WHOLE=batch <= ROW,
            SPLITS=power_of_2(splits, 1, 8),
            BLOCK=power_of_2(batch, 16, ROW),
            num_warps=4,
        )
    loss = torch.empty(shape, **float32)
    tile = power_of_2(batch, 16, 32)
    launch(
        gradient_matrix_kernel,
        loss.numel() + (layers * triton.cdiv(batch, tile) ** 2 if need_grad else 0),
        device,
        gram,
        scalars,
        gradient_matrix,
        loss,
        loss.numel(),
        layers,
        batch,
        options.eps,
        L1=l1,
        ZERO_ROW_GRAD=options.zero_row_grad,
        NEED_GRAD=need_grad,
        TILE=tile,
        BLOCK=power_of_2(layers * batch // loss.numel(), 16, 1024),
        num_warps=4,
    )
    return loss, gradient_matrix


def sp_backward(grad: Tensor, student: list[Tensor], gradient_matrix: Tensor) -> list[Tensor]:
    gradients = [grad_like(s) for s in student]
    batch = student[0].shape[0]
    block_b = power_of_2(batch, 16, 64)
    items = [_rows(s, i, False) for i, s in enumerate(student) if s.numel()]
    for group in grouped(items, _key):
        block_d = power_of_2(max(item.length for item in group), 16, 64 if block_b == 64 else 128)
        starts, programs = starts_of(
            [triton.cdiv(batch, block_b) * triton.cdiv(item.length, block_d) for item in group]
        )
        launch(
            gradient_kernel,
            programs,
            student[0].device,
            gradients=tuple(gradients[item.place] for item in group),
            matrix=gradient_matrix,
            grad=grad,
            grad_stride=grad.stride(0) if grad.dim() else 0,
            starts=starts,
            layers=tuple(item.place for item in group),
            B=batch,
            **_arguments(group),
            PRECISION=split_precision(group[0].x),
            BLOCK_B=block_b,
            BLOCK_K=power_of_2(batch, 16, 32),
            BLOCK_D=block_d,
            num_warps=4,
            num_stages=3,
        )
    return gradients
