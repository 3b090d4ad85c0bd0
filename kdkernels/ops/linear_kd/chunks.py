"""linear_kd's two passes: tokens in chunks, each to logits, losses, their gradient in place, and shares of the sums.

A chunk is as many tokens as the memory allows, since each reads the weights anew. On CPUs its matrices are in pieces of
some tokens, none of which is half of all logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import choose
from ..softmax_kl.op import Labels, Rows
from . import ranks, top_k
from .columns import Columns
from .products import Gradients, Linear, logits, slope
from .record import LinearKD

IGNORED = -100  # the label of rows that do not count, whatever the caller's is
# Bytes of logits, and of what is made of them, at a time. Each chunk reads the weights and reads and writes the sums of
# their gradient, which many rows make cheap. On a CPU it may be as much as the weights, beside which that is little.
BUDGET_CPU, BUDGET_ACCELERATOR = 64 << 20, 1 << 30
BLOCK = 64  # products are faster with whole blocks of rows


class Tokens(NamedTuple):
    """The tokens that count and their labels, None where there is nothing to know."""

    keep: Tensor | None  # (N,) bool
    target: Tensor | None  # (N,) labels; IGNORED where a row does not count, -1 where the caller's is out of range

    @classmethod
    def of(cls, x: LinearKD) -> Tokens:
        keep = x.mask
        if x.target is not None:
            labelled = x.target != x.options.ignore_index
            keep = labelled if keep is None else keep & labelled
        if keep is None:
            return cls(None, None)
        target = torch.zeros_like(keep, dtype=torch.int64) if x.target is None else x.target.clamp(min=-1)
        return cls(keep, target.where(keep, IGNORED))

    def scale(self, x: LinearKD) -> Tensor:
        """() what the sum of the rows is multiplied by."""
        one = torch.ones((), dtype=x.dtype, device=x.hidden.device)
        if x.options.reduction != "mean":
            return one
        if x.denominator is not None:
            return one / x.denominator
        if self.keep is None:
            return one / max(x.hidden.shape[0], 1)
        return one / self.keep.sum().clamp(min=1)

    def narrow(self, rows: slice) -> Tokens:
        return Tokens(*(None if t is None else t[rows] for t in self))


def chunk_size(x: LinearKD, columns: Columns) -> int:
    """Tokens at a time: what the budget allows."""
    if x.options.chunk:
        return x.options.chunk
    matrices = 2 + (x.softcap != 0) + (x.teacher.ids is not None and x.terms.ce != 0)
    of_weight = x.weight.numel() * x.dtype.itemsize
    budget = max(BUDGET_CPU, of_weight) if x.hidden.is_cpu else BUDGET_ACCELERATOR
    rows = max(1, budget // max(matrices * columns.share * x.dtype.itemsize, 1))
    if not x.hidden.is_cpu:
        rows = min(rows, piece_size(x))
    return rows - rows % BLOCK if rows > BLOCK else rows


def piece_size(x: LinearKD) -> int:
    """Tokens whose logits are one tensor: about a third of all, less than half; where they are many, by the block."""
    tokens = x.hidden.shape[0]
    third = max(1, -(-tokens // 3))
    return third + (-third % BLOCK if tokens > 6 * BLOCK else 0)


def _nothing(x: LinearKD, columns: Columns) -> Gradients:
    """Where the gradients are summed up, in the logits' dtype."""

    def sums(like: Tensor | None, written: int) -> Tensor | None:
        """The first chunk's products write so many rows; the others are columns that do not exist."""
        if like is None:
            return None
        result = torch.empty(like.shape, dtype=x.dtype, device=like.device)
        result[written if x.hidden.shape[0] else 0 :].zero_()
        return result

    hidden, weight, bias = x.inputs
    return Gradients(sums(hidden, x.hidden.shape[0]), sums(weight, columns.size), sums(bias, 0))


def sweep(x: LinearKD, tokens: Tokens, columns: Columns, gradients: Gradients | None, upstream: Tensor) -> Tensor:
    """The rows' losses (N,); with ``gradients``, theirs times ``upstream``, (N,) or one for all, are added to them."""
    n, size = x.hidden.shape[0], chunk_size(x, columns)
    head = Linear(x.weight, x.bias, x.scale, x.softcap).narrow(columns.size)
    losses = torch.empty(n, dtype=x.dtype, device=x.hidden.device)
    student = _memory(x, columns, min(size, n))
    other = _memory(x, columns, min(size, n), gradients)
    for begin in range(0, n, size):
        rows = slice(begin, min(begin + size, n))
        h = _counted(x.hidden[rows], tokens.narrow(rows).keep)
        z, t = _first(student, len(h)), _first(other, len(h))
        logits(head, h, z)
        _teacher_logits(x, rows, t, tokens, columns)
        losses[rows], g = _row_passes(x, head, begin, z, t, tokens, columns, None if gradients is None else upstream)
        if gradients is not None:
            gradients.add(head, h, g, begin)
    return losses


def _memory(x: LinearKD, columns: Columns, size: int, gradients: Gradients | None = None) -> list[Tensor]:
    """For so many tokens' logits, on CPUs in pieces.

    With ``gradients`` it may be the weights': where all tokens are one chunk, they are written after the teacher's
    logits were read.
    """
    piece = piece_size(x) if x.hidden.is_cpu else size
    lengths = [min(piece, size - begin) for begin in range(0, size, piece)]
    if gradients is not None and gradients.weight is not None and x.teacher.ids is None and size == len(x.hidden):
        lent = gradients.weight[: columns.size].view(-1)
        if lent.numel() >= size * columns.size:
            return list(lent[: size * columns.size].view(size, columns.size).split(piece))
    return [torch.empty(n, columns.size, dtype=x.dtype, device=x.hidden.device) for n in lengths]


def _first(memory: list[Tensor], rows: int) -> list[Tensor]:
    """Its first rows: those of a chunk, of which the last may be shorter."""
    piece = len(memory[0])
    return [m[: rows - i * piece] for i, m in enumerate(memory) if i * piece < rows]


def _counted(h: Tensor, keep: Tensor | None) -> Tensor:
    """Whatever a row holds that does not count, even NaN, has no part in the sums over rows."""
    return h if keep is None else h.masked_fill(~keep[:, None], 0)


def _teacher_logits(x: LinearKD, rows: slice, out: list[Tensor], tokens: Tokens, columns: Columns) -> None:
    """Into ``out``, where they are still to be made and wanted."""
    t = x.teacher
    if t.teacher_hidden is None or not x.terms.soft:
        return
    assert t.teacher_weight is not None
    head = Linear(t.teacher_weight, t.teacher_bias, t.teacher_scale, t.teacher_softcap).narrow(columns.size)
    logits(head, _counted(t.teacher_hidden[rows], tokens.narrow(rows).keep), out)


def _row_passes(
    x: LinearKD,
    head: Linear,
    begin: int,
    student: list[Tensor],
    other: list[Tensor],
    tokens: Tokens,
    columns: Columns,
    upstream: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """A chunk's losses, and the gradients of its pieces of h W^T + b."""
    losses, gradients = [], []
    for z, memory in zip(student, other, strict=True):
        rows = slice(begin, begin + len(z))
        begin = rows.stop
        cap = None if upstream is None else slope(head, z)
        weight = upstream[rows] if upstream is not None and upstream.ndim else upstream
        values, g = _row_pass(x, rows, z, memory, tokens.narrow(rows), columns, weight)
        losses.append(values)
        if g is not None:
            gradients.append(g if cap is None else g.mul_(cap))
    return torch.cat(losses), gradients


def _row_pass(
    x: LinearKD, rows: slice, z: Tensor, other: Tensor, tokens: Tokens, columns: Columns, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A piece's losses, and their gradient, in z's memory where possible.

    ``other`` is memory like z's, and has the logits of a teacher that is a head.
    """
    if x.teacher.ids is not None and x.teacher.logprobs is not None:
        entries = x.teacher.ids[rows], x.teacher.logprobs[rows]
        return top_k.row_pass(x, z, other, *entries, tokens.keep, tokens.target, columns, upstream)
    t = other if x.terms.soft else z
    if x.teacher.teacher_logits is not None and x.terms.soft:
        t = x.teacher.teacher_logits[rows, : columns.size]
    if columns.group is not None:
        return ranks.row_pass(x, z, t, tokens.keep, tokens.target, columns, upstream)
    labels = Labels(tokens.target, ignore_index=IGNORED, smoothing=x.options.smoothing)
    temperature, divergence, beta, standardize, *_ = x.options
    record = Rows(z, t, labels, x.terms, temperature, "none", divergence, beta, standardize)
    implementation = choose("softmax_kl", z, t)
    losses, stats, scale = implementation.forward(record, upstream is not None)
    if upstream is None:
        return losses, None
    return losses, implementation.backward(upstream, record, stats, scale, in_place=True)


def forward(x: LinearKD, need_grad: bool, columns: Columns | None = None) -> tuple[Tensor, ...]:
    """The loss, its gradients (empty for "none" and where none is wanted), and what they are still to be scaled by."""
    columns = Columns.alone(x) if columns is None else columns
    tokens = Tokens.of(x)
    now = need_grad and x.options.reduction != "none"
    gradients = _nothing(x, columns) if now else None
    scale = tokens.scale(x)
    # A mean's gradients are scaled as they are made, but for fp16, in which products would lose what small rows are.
    one = torch.ones_like(scale)
    early, late = (one, scale) if x.hidden.dtype == torch.float16 else (scale, one)
    losses = sweep(x, tokens, columns, gradients, early)
    loss = losses if x.options.reduction == "none" else losses.sum() * scale
    if x.hidden.is_cpu and math.isnan(losses.sum().item()):
        _check_values(x, tokens, columns)
    return loss, *_outputs(x, gradients, columns), late


def backward(grad: Tensor, x: LinearKD, columns: Columns | None = None) -> tuple[Tensor, ...]:
    """The gradients of "none": the logits are made again."""
    columns = Columns.alone(x) if columns is None else columns
    gradients = _nothing(x, columns)
    sweep(x, Tokens.of(x), columns, gradients, grad)
    return _outputs(x, gradients, columns)


def _outputs(x: LinearKD, gradients: Gradients | None, columns: Columns) -> tuple[Tensor, ...]:
    empty = x.hidden.new_empty(0, dtype=x.dtype)
    if gradients is None:
        return empty, empty.clone(), empty.clone()
    if gradients.hidden is not None:
        columns.add(gradients.hidden)
    return tuple(empty.clone() if g is None else g for g in gradients)


def _check_values(x: LinearKD, tokens: Tokens, columns: Columns) -> None:
    """Raise for labels and top-k entries that made a row NaN. On the CPU alone: elsewhere the host would wait."""
    if x.target is not None and tokens.keep is not None:
        bad = x.target[tokens.keep & ((x.target < 0) | (x.target >= columns.total))]
        if bad.numel():
            raise ValueError(
                f"target has label {int(bad[0])}; valid are 0..{columns.total - 1}, "
                f"and {x.options.ignore_index} to ignore"
            )
    top_k.check_values(x, tokens.keep, columns)
