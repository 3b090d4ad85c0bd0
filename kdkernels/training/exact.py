"""One optimizer step on several micro-batches as if they were one batch, for methods that compare rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..accumulation import cached_backward
from .distillation import Distillation, DistillationOutput
from .methods import Batch, Outputs

Columns = list[Tensor]
LABELS = ("target", "target_mixed", "lam", "target_neg")


def exact_step(
    distillation: Distillation,
    micro_batches: Sequence[Sequence[Any]],
    backward: Callable[[Tensor], Any],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> DistillationOutput:
    """The loss of the whole batch and its gradients, with one micro-batch's graph at a time."""
    layouts: list[_Layout] = []
    results: list[DistillationOutput] = []

    def forward(micro_batch: Sequence[Any]) -> Columns:
        with autocast():
            batch = distillation.batch(*micro_batch)
            student, teacher = distillation.outputs(batch.images, batch.teacher)
        layouts[:] = [_Layout(student, teacher, batch)]
        return layouts[0].columns(student, teacher, batch)

    def loss(*columns: Tensor) -> Tensor:
        with autocast():
            results.append(distillation.loss(*layouts[0].outputs(list(columns))))
        return results[0].loss

    value = cached_backward(forward, micro_batches, loss, modules=distillation.student, backward=backward)
    return results[0]._replace(loss=value, logits=results[0].logits.detach())


class _Layout:
    """How outputs and labels become a list of tensors whose rows can be concatenated, and how they come back."""

    def __init__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        self.students = len(student.features)
        self.teachers = None if teacher is None else len(teacher.features)
        self.labels = [name for name in LABELS if getattr(batch, name) is not None]

    def columns(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Columns:
        columns = [student.logits, *student.features]
        if teacher is not None:
            columns += [teacher.logits, *teacher.features]
        for name in self.labels:
            label = getattr(batch, name)
            columns.append(label if label.dim() else label.expand(len(batch.target)))  # one lam for a micro-batch
        return columns

    def outputs(self, columns: Columns) -> tuple[Outputs, Outputs | None, Batch]:
        def take(features: int) -> Outputs:
            logits, *rest = (columns.pop(0) for _ in range(1 + features))
            return Outputs(logits, rest)

        student = take(self.students)
        teacher = None if self.teachers is None else take(self.teachers)
        labels: dict[str, Any] = dict(zip(self.labels, columns, strict=True))
        return student, teacher, Batch(torch.empty(0), labels.pop("target"))._replace(**labels)
