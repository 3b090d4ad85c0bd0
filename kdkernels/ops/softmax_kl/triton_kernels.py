"""softmax_kl in Triton. Rows are independent; all arithmetic is fp32, exponentials are of differences from the maximum.

Forward: one launch for the rows, and one that sums what its programs left where there were several. Backward: one
launch, elementwise from the saved statistics. Notation as in reference.py.

Sizes: a tile of 2048 numbers per network and program (1024 with decoupled terms, which need more registers), as many
short rows as fit; rows of up to 8192 classes are held in registers and read once, longer ones are read twice, in
chunks of 4096: once for the maxima and sums, and once for the terms, which then need no difference of large numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import aligned, alignment, device_reason, launch, power_of_2, store
from .triton_device import load_at, load_labels, load_tile, others, rest_log_q
from .triton_forward import rows_kernel, sum_kernel

WHOLE, CHUNK, TILE = 8192, 4096, 2048


def supports(*tensors: Tensor) -> str | None:
    return device_reason(*tensors)


@triton.jit
def gradient_kernel(
    grad,  # [] or [N]
    student,  # [N, C]
    teacher,  # [N, C]
    target,  # [N] labels, or [N, C] where DENSE
    target_mixed,  # [N]
    lam,  # [] or [N]
    stats,  # [5 or 9, N]
    scale,  # []
    out,  # [N, C], contiguous
    N,
    C,
    blocks,  # programs per row
    s_strides,
    t_strides,
    target_strides,
    label_strides,
    grad_stride,
    inverse_t,
    w_ce,
    w_kl,
    w_target,
    w_other,
    ignore_index,
    CE: tl.constexpr,
    KL: tl.constexpr,
    TARGET: tl.constexpr,
    OTHER: tl.constexpr,
    LABELS: tl.constexpr,
    MIXED: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    DECOUPLED: tl.constexpr = TARGET or OTHER
    TEACHER: tl.constexpr = KL or DECOUPLED
    C = aligned(C, ALIGN)
    pid = tl.program_id(0)
    row_index = (pid // blocks) * ROWS + tl.arange(0, ROWS)
    inside = row_index < N
    rows = tl.minimum(row_index, N - 1).to(tl.int64)
    cols = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    step = rows * 0 + N
    s_max = tl.load(stats + rows)

    s = load_tile(student, rows, cols, s_strides, C, 0.0, ALIGN) - s_max[:, None]
    result = tl.zeros([ROWS, BLOCK_C], tl.float32)
    if LABELS:
        a, b, weight_a, weight_b, keep, valid = load_labels(
            target, target_mixed, lam, rows, label_strides, C, ignore_index, MIXED
        )
    if CE:
        p = tl.exp(s - tl.load(stats + 2 * step + rows)[:, None])
        if LABELS:
            p -= tl.where(cols[None, :] == a[:, None], weight_a[:, None], 0.0)
            if MIXED:
                p -= tl.where(cols[None, :] == b[:, None], weight_b[:, None], 0.0)
        if DENSE:
            total = tl.zeros([ROWS], tl.float32)
            for start in range(0, C, BLOCK_C):
                total += tl.sum(
                    load_tile(target, rows, start + tl.arange(0, BLOCK_C), target_strides, C, 0.0, ALIGN), 1
                )
            p = p * total[:, None] - load_tile(target, rows, cols, target_strides, C, 0.0, ALIGN)
        result = w_ce * p
    if TEACHER:
        t_max = tl.load(stats + step + rows)
        logz_s = tl.load(stats + 3 * step + rows)
        logz_t = tl.load(stats + 4 * step + rows)
        s = s * inverse_t
        t = (load_tile(teacher, rows, cols, t_strides, C, 0.0, ALIGN) - t_max[:, None]) * inverse_t
        difference = tl.exp(s - logz_s[:, None]) - tl.exp(t - logz_t[:, None])  # q_s - q_t
        if DECOUPLED:
            rest_max_s = tl.load(stats + 5 * step + rows)
            rest_max_t = tl.load(stats + 6 * step + rows)
            rest_logz_s = tl.load(stats + 7 * step + rows)
            rest_logz_t = tl.load(stats + 8 * step + rows)
            other = others(cols, a, b)
            other_s = tl.exp(rest_log_q(s, rest_max_s, rest_logz_s, other))
            other_t = tl.exp(rest_log_q(t, rest_max_t, rest_logz_t, other))
            # S_s - S_t from whichever side has the smaller numbers
            mass_s = tl.exp((load_at(student, rows, a, s_strides) - s_max) * inverse_t - logz_s)
            mass_t = tl.exp((load_at(teacher, rows, a, t_strides) - t_max) * inverse_t - logz_t)
            mass_s_b = tl.exp((load_at(student, rows, b, s_strides) - s_max) * inverse_t - logz_s)
            mass_t_b = tl.exp((load_at(teacher, rows, b, t_strides) - t_max) * inverse_t - logz_t)
            mass_s += tl.where(a == b, 0.0, mass_s_b)
            mass_t += tl.where(a == b, 0.0, mass_t_b)
            rest_s = tl.exp(rest_max_s + rest_logz_s - logz_s)
            rest_t = tl.exp(rest_max_t + rest_logz_t - logz_t)
            rest_difference = tl.where(mass_s < 0.5, mass_t - mass_s, rest_s - rest_t)
            factor_s = w_target * rest_difference + w_other
            decoupled = tl.where(other, other_s * factor_s[:, None] - w_other * other_t, w_target * difference)
            result += inverse_t * decoupled
        if KL:
            result += (w_kl * inverse_t) * difference
    factor = tl.load(grad + rows * grad_stride) * tl.load(scale)
    if LABELS:
        factor = tl.where(valid, factor, float("nan"))
        result = tl.where(keep[:, None], result * factor[:, None], 0.0)
    else:
        result = result * factor[:, None]
    store(out + (rows * C)[:, None] + cols[None, :], result, inside[:, None] & (cols < C)[None, :])


def _options(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    target_mixed: Tensor | None,
    lam: Tensor | None,
    temperature: float,
    weights: list[float],
    ignore_index: int,
) -> dict[str, Any]:
    """The arguments that both passes share. A pointer that is not read is the student's."""
    dense = target is not None and target.is_floating_point()
    w_ce, w_kl, w_target, w_other = weights
    between_rows = [x.stride(0) for x in (student, teacher, target if dense else None) if x is not None]
    lengths = [x.stride(0) if x is not None and x.dim() else 0 for x in (target, target_mixed, lam)]
    return {
        "student": student,
        "teacher": teacher,
        "target": student if target is None else target,
        "target_mixed": student if target_mixed is None else target_mixed,
        "lam": student if lam is None else lam,
        "N": student.shape[0],
        "C": student.shape[1],
        "s_strides": student.stride(),
        "t_strides": teacher.stride(),
        "target_strides": target.stride() if dense and target is not None else (0, 0),
        "label_strides": tuple(lengths),
        "inverse_t": 1 / temperature,
        "w_ce": w_ce,
        "w_kl": w_kl,
        "w_target": w_target,
        "w_other": w_other,
        "ignore_index": ignore_index,
        "CE": bool(w_ce) and target is not None,
        "KL": bool(w_kl),
        "TARGET": bool(w_target),
        "OTHER": bool(w_other),
        "LABELS": target is not None and not dense,
        "MIXED": target_mixed is not None,
        "DENSE": dense,
        "ALIGN": alignment(student.shape[1], *between_rows),
    }


def _tile_size(options: dict[str, Any]) -> int:
    return TILE // 2 if options["TARGET"] or options["OTHER"] else TILE


def forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    target_mixed: Tensor | None,
    lam: Tensor | None,
    temperature: float,
    weights: list[float],
    ignore_index: int,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, classes = student.shape
    options = _options(student, teacher, target, target_mixed, lam, temperature, weights, ignore_index)
    decoupled = options["TARGET"] or options["OTHER"]
    float32: dict[str, Any] = {"dtype": torch.float32, "device": student.device}
    stats = torch.empty((9 if decoupled else 5, n) if need_grad else (0,), **float32)
    if n == 0:
        return torch.zeros((0,) if reduction == "none" else (), **float32), stats, torch.ones((), **float32)
    whole = classes <= WHOLE
    block_c = power_of_2(classes, 4, WHOLE) if whole else CHUNK
    rows = power_of_2(n, 1, max(1, _tile_size(options) // block_c))
    programs = triton.cdiv(n, rows)
    mean, per_row = reduction == "batchmean", reduction == "none"
    loss, scale = torch.empty((n,) if per_row else (), **float32), torch.empty((), **float32)
    several = not per_row and programs > 1
    partial = torch.empty(2 * programs, **float32) if several else loss
    launch(
        rows_kernel,
        programs,
        student.device,
        loss=partial,
        stats=stats,
        scale=scale,
        **options,
        MEAN=mean,
        PER_ROW=per_row,
        ONE_PROGRAM=not several,
        STATS=need_grad,
        WHOLE=whole,
        ROWS=rows,
        BLOCK_C=block_c,
        num_warps=power_of_2(rows * block_c // 256, 4, 16),
    )
    if several:
        launch(
            sum_kernel,
            1,
            student.device,
            partial,
            loss,
            scale,
            programs,
            MEAN=mean,
            BLOCK=power_of_2(programs, 16, 1024),
        )
    return loss, stats, scale


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    target_mixed: Tensor | None,
    lam: Tensor | None,
    stats: Tensor,
    scale: Tensor,
    temperature: float,
    weights: list[float],
    ignore_index: int,
) -> Tensor:
    n, classes = student.shape
    out = torch.empty((n, classes), dtype=student.dtype, device=student.device)
    if n == 0:
        return out
    options = _options(student, teacher, target, target_mixed, lam, temperature, weights, ignore_index)
    tile = _tile_size(options)
    block_c = power_of_2(classes, 4, tile)
    rows = power_of_2(n, 1, tile // block_c)
    blocks = triton.cdiv(classes, block_c)
    launch(
        gradient_kernel,
        triton.cdiv(n, rows) * blocks,
        student.device,
        grad=grad,
        stats=stats,
        scale=scale,
        out=out,
        blocks=blocks,
        grad_stride=grad.stride(0) if grad.dim() else 0,
        **options,
        ROWS=rows,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out
