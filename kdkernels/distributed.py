"""Relational losses that are exact over ranks: the value and the gradients of one process on the concatenated batch.

The features are sharded, not the batch. With R ranks and Q the rows of all ranks in rank order:

    all-to-all: rank r receives the columns D_r of all ranks' Q, (B, D / R); D is padded with zeros to a multiple of R
    products = all-reduce of Q[:, D_r] Q[:, D_r]^T        B x B, exact: a Gram matrix is a sum over columns
    the loss, and the gradient at the products, the same on every rank;  dQ[:, D_r] from these;  all-to-all back

Each rank sends its own rows once, in their own dtype, and keeps 1/R of the columns. Products are fp32 (fp64 for fp64).

The convention for gradients. Every rank holds the same loss L, so backward computes the gradient of the sum of
(rank's upstream gradient * L) over the ranks: R dL/dQ where all ranks call ``loss.backward()``. DistributedDataParallel
then averages over the ranks, 1/R sum_r (R dL/dQ_r) dQ_r/dtheta = dL/dtheta: parameters get the one process's gradient,
and terms that are means over a rank's own rows (cross entropy) keep their usual meaning. Without
DistributedDataParallel, average the parameters' gradients over the ranks, or divide the loss by R and sum them.

Every rank of the group makes the same call, forward and backward. A call that differs (dtypes, widths, layers, options,
the backend) raises ValueError on every rank. A rank that never arrives, because it died or was given another group,
makes the others raise the process group's own timeout error: nothing here waits longer than
``init_process_group(timeout=...)``.
Row counts travel between ranks and are read on the host, so a step with ``group=`` cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .ops.backend import choose, requested
from .ops.checks import compute_dtype
from .ops.correlation import op as correlation
from .ops.correlation.op import CorrelationOptions
from .ops.gram.op import (
    COSINE_EPS,
    SPOptions,
    cosine_backward_op,
    grams_op,
    products_op,
    sp_backward_op,
    sp_from_grams_op,
)
from .ops.library import refuse_second_derivative


class Ranks(NamedTuple):
    """The ranks of a group that agreed on one call, and how many rows each of them brought."""

    group: dist.ProcessGroup
    rank: int
    sizes: list[int]

    @property
    def rows(self) -> int:
        return sum(self.sizes)


def group_of_many(group: dist.ProcessGroup | None, caller: str) -> dist.ProcessGroup | None:
    """The group, or None if this process is the only rank."""
    if group is None:
        return None
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{caller}: this rank is not a member of the group; only members may call")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{caller}: group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return group if dist.get_world_size(group) > 1 else None


def describe(tensors: Sequence[Tensor]) -> str:
    """What the ranks must agree on: each tensor's width, dtype and whether it takes part in backward."""
    return ", ".join(
        f"(B, {math.prod(x.shape[1:])}) {str(x.dtype).removeprefix('torch.')}{' with gradient' * _needs_grad(x)}"
        for x in tensors
    )


def _needs_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def meet(group: dist.ProcessGroup, rows: int, call: str, device: torch.device) -> Ranks:
    """Exchange row counts and make sure that every rank makes the same ``call`` (a description in words).

    A small all-gather carries a digest of the call. All ranks see the same table, so all of them raise or none
    does; the descriptions themselves travel only to be named in the error.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    text = f"{call}, backend {requested()}, {size} ranks".encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    table = _all_gather(torch.tensor([rows, len(text), digest], device=device), group)
    sizes, lengths, digests = (list(column) for column in zip(*table.tolist(), strict=True))
    if len(set(digests)) > 1:
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts = _all_gather(padded.to(device), group).cpu()
        names = [bytes(t[:n].tolist()).decode() for t, n in zip(texts, lengths, strict=True)]
        other = next(r for r in range(size) if names[r] != names[0])
        raise ValueError(
            f"the ranks of a group must make the same call: rank 0: {names[0]}; rank {other}: {names[other]}"
        )
    return Ranks(group, rank, sizes)


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.stack(parts)


def gather_labels(target: Tensor, ranks: Ranks) -> Tensor:
    """The (N,) labels of all ranks, in rank order."""
    padded = target.new_zeros(max(ranks.sizes))
    padded[: target.shape[0]] = target
    table = _all_gather(padded, ranks.group)
    return torch.cat([row[:n] for row, n in zip(table, ranks.sizes, strict=True)])


class _GatherRows(torch.autograd.Function):
    """What is computed from the rows is the same on every rank, up to ``replicate``, so its gradient is complete."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        padded = x.new_zeros(max(ranks.sizes), x.shape[1])
        padded[: x.shape[0]] = x
        parts = _all_gather(padded, ranks.group)
        return torch.cat([part[:n] for part, n in zip(parts, ranks.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.split(ctx.ranks.sizes)[ctx.ranks.rank], None


def of_all_rows(
    loss: Callable[..., Tensor], rows: Sequence[Tensor], group: dist.ProcessGroup | None, call: str
) -> Tensor:
    """``loss(*rows)`` of (N, C) rows, or of those of all ranks, which every rank gathers: for short rows, as logits.

    ``call`` are the loss's name and options in words.
    """
    if group is None or (many := group_of_many(group, call.partition(",")[0])) is None:
        return loss(*rows)
    ranks = meet(many, rows[0].shape[0], f"{call} of {describe(rows)}", rows[0].device)
    return replicate(loss(*(_GatherRows.apply(x, ranks) for x in rows)), ranks)


def shard_columns(x: Tensor, ranks: Ranks) -> Tensor:
    """This rank's share of the columns of all ranks' rows: (B_local, ...) to (B, ceil(D / R)), in x's dtype."""
    width = math.prod(x.shape[1:])
    # the order of the columns must be one on all ranks, so channels_last is not read as it lies here
    return _ShardColumns.apply(x.reshape(x.shape[0], width), ranks)


def shard_rows(x: Tensor, ranks: Ranks) -> Tensor:
    """``shard_columns`` in fp32 (fp64): for rows used more than once, whose gradients are rounded once, as a sum."""
    return shard_columns(x, ranks).to(compute_dtype(x))


class _ShardColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.width = ranks, x.shape[1]
        count, share = len(ranks.sizes), -(-x.shape[1] // len(ranks.sizes))
        padded = torch.nn.functional.pad(x, (0, count * share - x.shape[1]))
        send = padded.view(x.shape[0], count, share).transpose(0, 1).reshape(-1)
        mine = x.shape[0] * share
        out = x.new_empty(ranks.rows, share)
        dist.all_to_all_single(out.view(-1), send, [n * share for n in ranks.sizes], [mine] * count, group=ranks.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ranks, count, share = ctx.ranks, len(ctx.ranks.sizes), grad.shape[1]
        rows = ranks.sizes[ranks.rank]
        out = grad.new_empty(count, rows, share)
        splits = [n * share for n in ranks.sizes]
        send = grad.contiguous().view(-1)
        dist.all_to_all_single(out.view(-1), send, [rows * share] * count, splits, group=ranks.group)
        return out.transpose(0, 1).reshape(rows, count * share)[:, : ctx.width], None


class _Replicate(torch.autograd.Function):
    """The same loss on every rank: the gradient of all ranks' copies together."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative("a loss with group=")
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def replicate(loss: Tensor, ranks: Ranks) -> Tensor:
    """The last step of every loss over ranks: sums the upstream gradients over the ranks, as the module says."""
    return _Replicate.apply(loss, ranks.group)


class _SPShards(torch.autograd.Function):
    """The SP loss from column shards; saves the student's shards and the B x B gradient matrices."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, teachers: list[Tensor], options: SPOptions, *students: Tensor) -> Tensor:
        grams = grams_op([*students, *teachers])
        dist.all_reduce(grams, group=ranks.group)
        need_grad = any(ctx.needs_input_grad[3:])
        loss, matrix = sp_from_grams_op(grams.unflatten(0, (2, len(students))), *options, need_grad)
        ctx.save_for_backward(matrix, *students)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, *students = ctx.saved_tensors
        return None, None, None, *sp_backward_op(grad, matrix, students)


def sp_over_ranks(
    students: list[Tensor], teachers: list[Tensor], options: SPOptions, group: dist.ProcessGroup
) -> Tensor:
    """sp_loss of the whole group's batch."""
    call = f"sp_loss of student {describe(students)}, teacher {describe(teachers)}, {options}"
    ranks = meet(group, students[0].shape[0], call, students[0].device)
    shards = [shard_columns(s, ranks) for s in students]
    constants = [shard_columns(t, ranks) for t in teachers]
    return replicate(_SPShards.apply(ranks, constants, options, *shards), ranks)


def _cosines(a: Tensor, b: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Gram.cosine_forward from column shards of a and b, the same on every rank.

    Products and squares are sums over columns, so an op makes them; what remains is elementwise.
    """
    (n, _), m = a.shape, b.shape[0]
    parts = products_op(a, b)
    packed = torch.cat([x.view(-1) for x in parts])
    dist.all_reduce(packed, group=group)
    inverse_a, inverse_b = packed[n * m :].sqrt().clamp(min=COSINE_EPS).reciprocal().split([n, m])
    return packed[: n * m].view(n, m) * inverse_a[:, None] * inverse_b, inverse_a, inverse_b


class _CosineShards(torch.autograd.Function):
    """Cosines from column shards. All later steps are the same on every rank, up to ``replicate``, so the gradient
    that arrives here is complete."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, group: dist.ProcessGroup) -> Tensor:
        similarity, inverse_a, inverse_b = _cosines(a, b, group)
        ctx.save_for_backward(similarity, inverse_a, inverse_b, a, b)
        return similarity

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *cosine_backward_op(grad, *ctx.saved_tensors), None


def cosine_over_ranks(a: Tensor, b: Tensor, ranks: Ranks) -> Tensor:
    """``ops.gram.cosine_similarity`` from column shards of a and b, (N, M) on every rank. ``replicate`` must follow."""
    return _CosineShards.apply(a, b, ranks.group)


class _CorrelationShards(torch.autograd.Function):
    """ops/correlation/ on column shards: the same two functions, with the cosines of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, options: CorrelationOptions, group: dist.ProcessGroup
    ) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            cosine, kl = partial(_cosines, group=group), choose("softmax_kl", student, teacher)
            loss, *saved = correlation.forward(cosine, kl, student, teacher, options, ctx.needs_input_grad[0])
        ctx.save_for_backward(student, *saved)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, *saved = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            gram, kl = choose("gram", student), choose("softmax_kl", saved[0], saved[3])
            return correlation.backward(gram, kl, grad, student, saved, ctx.options), None, None, None


def correlation_over_ranks(
    student: Tensor, teacher: Tensor, options: CorrelationOptions, group: dist.ProcessGroup
) -> Tensor:
    """correlation_loss of the whole group's batch."""
    call = f"correlation_loss of student {describe([student])}, teacher {describe([teacher])}, {options}"
    ranks = meet(group, student.shape[0], call, student.device)
    shards = shard_columns(student, ranks), shard_columns(teacher, ranks)
    if not correlation.comparable(ranks.rows, options.views):
        return replicate(correlation.nothing(*shards, ranks.rows, options), ranks)
    return replicate(_CorrelationShards.apply(*shards, options, ranks.group), ranks)
