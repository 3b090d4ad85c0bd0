"""What a trainer has to do for methods that compare the rows of a batch (sp, mlkd)."""

from __future__ import annotations

import torch.distributed as dist

from ..training.distillation import Distillation


def whole_batches(distillation: Distillation, micro_batches: int, processes: int) -> None:
    """Compare the rows over all processes; refuse micro-batches, which would be compared only within themselves."""
    method = distillation.method
    if micro_batches > 1 and method.relational:
        raise ValueError(
            f"{type(method).__name__} compares the rows of a batch, and {micro_batches} micro-batches are not one "
            "batch: do not accumulate here, or use kdkernels.training.fit, which does it exactly"
        )
    if processes > 1:
        method.group = dist.group.WORLD
