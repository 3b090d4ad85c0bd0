"""RKD, PKT, CC and IRG of one process's batch, or of the whole batch of a group's ranks (see distributed.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import describe, group_of_many, meet, replicate, shard_columns
from .ops.checks import compute_dtype
from .ops.relation import op


class _RelationShards(torch.autograd.Function):
    """ops/relation/ on column shards: measures are sums over columns, and all that follows is the same everywhere."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, options: op.Options, reduction: str, group: dist.ProcessGroup
    ) -> Tensor:
        name, numbers = op.pack(options)
        measures = op.measures_op([student, teacher], name)
        dist.all_reduce(measures, group=group)
        loss, matrix = op.loss_op(measures, name, numbers, reduction, ctx.needs_input_grad[0])
        ctx.save_for_backward(matrix, student)
        return loss.to(compute_dtype(student, teacher))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, student = ctx.saved_tensors
        return op.backward_op(grad, matrix, student), None, None, None, None


def relation_of(
    student: Tensor,
    teacher: Tensor,
    options: op.Options,
    reduction: str,
    group: dist.ProcessGroup | None,
    caller: str,
) -> Tensor:
    """A loss of ops/relation/, of this process's batch or of the whole group's."""
    teacher = teacher.detach()
    if (many := group_of_many(group, caller)) is None:
        return op.relation(student, teacher, options, reduction)
    call = f"{caller} of student {describe([student])}, teacher {describe([teacher])}, {options}, {reduction}"
    ranks = meet(many, student.shape[0], call, student.device)
    shards = shard_columns(student, ranks), shard_columns(teacher, ranks)
    return replicate(_RelationShards.apply(*shards, options, reduction, ranks.group), ranks)
