"""Students whose weights are sharded over processes: PyTorch's FSDP2 by Accelerate's plug-in.

The teacher is no submodule, so each process has all of it.
"""

from __future__ import annotations

import logging

import torch.distributed.fsdp as fsdp
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env

from .distillation import Distillation

logger = logging.getLogger("kdkernels")


def check(accelerator: Accelerator, distillation: Distillation, saves: bool) -> None:
    """Refuse what does not work with sharded weights, before anything is sharded.

    Raises:
        ValueError: with what to do instead.
    """
    name = type(distillation.method).__name__
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("fit shards with FSDP2 alone: FullyShardedDataParallelPlugin(fsdp_version=2)")
        if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "FSDP's cpu_ram_efficient_loading would take the teacher's weights away: "
                "FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)"
            )
        if saves:
            raise ValueError("fit saves no sharded models: leave out output, and save with accelerator.save_state")
        if distillation.method.relational and accelerator.gradient_accumulation_steps > 1:
            raise ValueError(
                f"{name} takes all micro-batches of a step as one batch, which is not possible with sharded weights: "
                "accumulate=1 and more processes or larger batches, or DistributedDataParallel"
            )
    elif accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        logger.warning("Accelerate shards on accelerators alone: here each process has all of the student")


def register(distillation: Distillation) -> None:
    """Let the student's logits be had without a loss, for tests, if it is sharded."""
    fsdp.register_fsdp_forward_method(distillation, "predict")
