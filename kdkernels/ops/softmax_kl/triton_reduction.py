"""What becomes of the rows' losses in softmax_kl: stored, summed by one program, or by a kernel that follows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_loss(loss, scale, result, row_index, inside, counts, REDUCTION: tl.constexpr):
    """What this program's rows give, by reduction."""
    pid = tl.program_id(0)
    if REDUCTION == "none":
        tl.store(loss + row_index, result, mask=inside)
        if pid == 0:
            tl.store(scale, 1.0)
    else:
        total = tl.sum(tl.where(inside, result, 0.0), 0)
        count = tl.sum(counts.to(tl.float32), 0)
        if REDUCTION == "partial":
            tl.store(loss + pid, total)
            tl.store(loss + tl.num_programs(0) + pid, count)
        else:
            _store_total(loss, scale, total, count, REDUCTION)


@triton.jit
def _store_total(loss, scale, total, count, REDUCTION: tl.constexpr):
    factor = 1.0
    if REDUCTION == "mean":
        factor = 1.0 / tl.maximum(count, 1.0)
    tl.store(scale, factor)
    tl.store(loss, total * factor)


@triton.jit
def sum_kernel(
    partial,  # [2, P]: sums of rows, and how many rows count
    loss,  # []
    scale,  # []
    P,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    totals = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, BLOCK):
        at = start + tl.arange(0, BLOCK)
        totals += tl.load(partial + at, mask=at < P, other=0.0)
        counts += tl.load(partial + P + at, mask=at < P, other=0.0)
    _store_total(loss, scale, tl.sum(totals, 0), tl.sum(counts, 0), REDUCTION)
