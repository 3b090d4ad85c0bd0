"""softmax_kl in Triton. Rows are independent; all arithmetic is fp32, exponentials are of differences from the maximum.

Forward: one launch for the rows, and one that sums what its programs left where there were several. Backward: one
launch, elementwise from the saved statistics. Notation as in triton_device.py.

Sizes: a tile of 2048 numbers per network and program (1024 with decoupled terms, which need more registers), as many
short rows as fit; rows of up to 8192 classes (4096 standardised or decoupled) are held in registers and read once,
longer ones are read twice, in chunks of 4096: once for the maxima and sums, and once for the terms, which then need no
difference of large numbers. Standardised, they are read three times more: maxima, moments, and what the gradient loses.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned, alignment, device_reason, launch, power_of_2, store
from .op import Rows
from .triton_device import (
    Has,
    Inputs,
    Labels,
    Strided,
    load_labels,
    load_stats,
    load_tile,
)
from .triton_forward import rows_kernel
from .triton_gradient import soft_gradient, target_gradient
from .triton_ratio import Share
from .triton_reduction import sum_kernel

WHOLE, CHUNK, TILE = 8192, 4096, 2048


def supports(*tensors: Tensor) -> str | None:
    return device_reason(*tensors)


@triton.jit
def gradient_kernel(
    grad,  # Strided [N], or one number for all with a stride of 0
    x,  # Inputs
    stats,  # [*, N]
    scale,  # []
    out,  # [N, C], contiguous; may be the student's logits
    C,
    blocks,  # programs per row
    HAS: tl.constexpr,  # Has
    ALIGN: tl.constexpr,  # divides C and what lies between rows
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = aligned(C, ALIGN)
    pid = tl.program_id(0)
    row_index = (pid // blocks) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(row_index, x.N - 1).to(tl.int64)
    cols = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    of_s, of_t, saved = load_stats(stats, rows, x.N, HAS)
    s = load_tile(x.student, rows, cols, C, 0.0, ALIGN)
    y = load_labels(x.labels, rows, C, HAS)
    result = tl.zeros([ROWS, BLOCK_C], tl.float32)
    if HAS.ce:
        result = x.terms.ce * _ce(x, y, s - of_s.top[:, None], of_s, rows, cols, C, HAS, ALIGN, BLOCK_C)
    if HAS.soft:
        t = load_tile(x.teacher, rows, cols, C, 0.0, ALIGN)
        zero = tl.zeros(rows.shape, tl.float32)
        target = Share(zero, zero, zero)
        if HAS.decoupled:
            target = target_gradient(x, rows, y, of_s, of_t, saved, HAS)
        soft = soft_gradient(x, y, s, t, of_s, of_t, saved, cols, target, HAS)
        if HAS.standardize:
            inverse = of_s.inverse_std[:, None]
            soft = (soft - saved.lost[:, None] * ((s - of_s.top[:, None]) * inverse - saved.mean[:, None])) * inverse
        result += soft
    factor = tl.load(grad.pointer + rows * grad.strides[0]) * tl.load(scale)
    factor = tl.where(y.valid, factor, float("nan"))
    result = tl.where(y.keep[:, None], result * factor[:, None], 0.0)
    store(out + (rows * C)[:, None] + cols[None, :], result, (row_index < x.N)[:, None] & (cols < C)[None, :])


@triton.jit
def _ce(x, y, s, of_s, rows, cols, C, HAS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """[R, K] dCE/ds: p - y, or sum(y) p - y where y is dense; s is relative to the maximum."""
    p = tl.exp(s - of_s.logz_p[:, None])
    e = x.labels.smoothing
    if HAS.labels:
        p -= (1.0 - e) * tl.where(cols[None, :] == y.a[:, None], y.weight_a[:, None], 0.0)
        if HAS.mixed:
            p -= (1.0 - e) * tl.where(cols[None, :] == y.b[:, None], y.weight_b[:, None], 0.0)
    if HAS.dense:
        total = tl.zeros(rows.shape, tl.float32)
        for start in range(0, C, BLOCK_C):
            total += tl.sum(load_tile(x.labels.target, rows, start + tl.arange(0, BLOCK_C), C, 0.0, ALIGN), 1)
        p *= ((1.0 - e) * total + e)[:, None]
        p -= (1.0 - e) * load_tile(x.labels.target, rows, cols, C, 0.0, ALIGN)
    if HAS.smooth:
        p -= e / C
    return p


def _strided(x: Tensor | None) -> Strided | None:
    return None if x is None else Strided(x, x.stride() or (0,))


def _arguments(x: Rows) -> dict[str, Any]:
    """Those that both passes share."""
    target, mixed, lam, ignore_index, smoothing = x.labels
    dense, decoupled = x.labels.dense, x.terms.decoupled
    between_rows = [z.stride(0) for z in (x.student, x.teacher, target if dense else None) if z is not None]
    return {
        "x": Inputs(
            _strided(x.student),
            _strided(x.teacher),
            Labels(_strided(target), _strided(mixed), _strided(lam), ignore_index, smoothing),
            x.terms,
            1 / x.temperature,
            *((1 - x.beta, x.beta) if x.divergence == "skew_reverse" else (x.beta, 1 - x.beta)),
            x.student.shape[0],
        ),
        "C": x.student.shape[1],
        "HAS": Has(
            ce=x.terms.ce != 0 and target is not None,
            kl=x.terms.kl != 0,
            target=x.terms.target_kl != 0,
            non_target=x.terms.non_target_kl != 0,
            decoupled=decoupled,
            soft=decoupled or x.terms.kl != 0,
            labels=target is not None and not dense,
            mixed=mixed is not None,
            smooth=smoothing != 0,
            dense=dense,
            divergence=x.divergence,
            standardize=x.standardize,
        ),
        "ALIGN": alignment(x.student.shape[1], *between_rows),
    }


def _tile_size(x: Rows) -> int:
    return TILE // 2 if x.terms.decoupled else TILE


def forward(x: Rows, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, classes = x.student.shape
    device, reduction = x.student.device, x.reduction
    float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    stats = torch.empty((x.stats, n) if need_grad else (0,), **float32)
    shape = (n,) if reduction == "none" else ()
    if n == 0:
        return torch.zeros(shape, **float32), stats, torch.ones((), **float32)
    whole = classes <= (WHOLE // 2 if x.standardize or x.terms.decoupled else WHOLE)
    block_c = power_of_2(classes, 4, WHOLE) if whole else CHUNK
    rows = power_of_2(n, 1, max(1, _tile_size(x) // block_c))
    programs = triton.cdiv(n, rows)
    loss, scale = torch.empty(shape, **float32), torch.empty((), **float32)
    several = reduction != "none" and programs > 1
    partial = torch.empty(2 * programs, **float32) if several else loss
    launch(
        rows_kernel,
        programs,
        device,
        loss=partial,
        stats=stats,
        scale=scale,
        **_arguments(x),
        REDUCTION="partial" if several else reduction,
        STATS=need_grad,
        WHOLE=whole,
        ROWS=rows,
        BLOCK_C=block_c,
        num_warps=power_of_2(rows * block_c // 256, 4, 16),
    )
    if several:
        block = power_of_2(programs, 16, 1024)
        launch(sum_kernel, 1, device, partial, loss, scale, programs, REDUCTION=reduction, BLOCK=block)
    return loss, stats, scale


def backward(grad: Tensor, x: Rows, stats: Tensor, scale: Tensor, in_place: bool = False) -> Tensor:
    n, classes = x.student.shape
    if in_place and x.terms.decoupled:  # whose label's logits every program of a row reads
        return x.student.copy_(backward(grad, x, stats, scale))
    out = x.student if in_place else torch.empty((n, classes), dtype=x.student.dtype, device=x.student.device)
    if n == 0:
        return out
    tile = _tile_size(x)
    block_c = power_of_2(classes, 4, tile)
    rows = power_of_2(n, 1, tile // block_c)
    blocks = triton.cdiv(classes, block_c)
    launch(
        gradient_kernel,
        triton.cdiv(n, rows) * blocks,
        x.student.device,
        grad=_strided(grad),
        stats=stats,
        scale=scale,
        out=out,
        blocks=blocks,
        **_arguments(x),
        ROWS=rows,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out
