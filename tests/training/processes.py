"""What the two processes of test_processes.py do: train by every method. What they end with goes to a file."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from forks import be_rank
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.training import METHODS, Distillation, fit, make_method
from kdkernels.training.methods import alone, stkd
from kdkernels.training.models import ConvNet
from kdkernels.training.triplets import TripletDataset, collate_triplets

BATCH, STEPS, EPOCHS = 12, 2, 2
SHARDED = ("kd", "sp", "amd")
# options under which a step of 12 images is neither tiny nor wild
OPTIONS: dict[str, dict[str, Any]] = {
    "sp": {"weight": 30.0},
    "alone": {"alpha": 1.0},
    "at": {"weight": 100.0},
    "pkt": {"weight": 300.0},
    "mlld": {"strong": partial(torch.flip, dims=(3,))},
    "mlkd": {"correlation_weight": 5.0, "supervised_weight": 0.1, "alignment_weight": 2.0},
    "corsd": {"logit_relation_weight": 0.1},
}


class Layer(nn.Sequential):
    """No batch norm: in a student its statistics are each process's own, as in any such training."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__(nn.Conv2d(cin, cout, 3, stride, 1), nn.Tanh())


def neighbours(images: Tensor, target: Tensor, alpha: float = 1.0) -> tuple[Tensor, ...]:
    """Mixup without chance: each image with the other one of its pair, so that half a batch is mixed as a whole one."""
    partner = torch.arange(len(target), device=target.device) ^ 1
    return 0.7 * images + 0.3 * images[partner], target, target[partner], torch.tensor(0.7)


class Fixed(TripletDataset):
    def draw(self, index: int) -> tuple[int, int]:
        members = self.members[self.labels[index]]
        return members[(self.position[index] + 1) % len(members)], self.members[1 - self.labels[index]][index % 3]


def loader(method: str, processes: int) -> DataLoader[Any]:
    classes = 2 if method == "corsd" else 4  # of two, the other one is no matter of chance
    generator = torch.Generator().manual_seed(1)
    dataset = TensorDataset(
        torch.randn(BATCH * STEPS, 1, 8, 8, generator=generator), torch.arange(BATCH * STEPS) * 5 // 3 % classes
    )
    if METHODS[method].triplets:
        return DataLoader(Fixed(dataset), BATCH // processes, collate_fn=collate_triplets)
    return DataLoader(dataset, BATCH // processes)


def trained(
    method: str, processes: int = 1, accelerator: Accelerator | None = None, **options: Any
) -> dict[str, Tensor]:
    """The student's and the heads' weights."""
    torch.manual_seed(0)
    classes = 2 if method == "corsd" else 4
    teacher, student = (ConvNet(1, classes, widths, Layer) for widths in ((5, 6, 7), (3, 4, 5)))
    module = Distillation(
        teacher if METHODS[method].needs_teacher else None, student, make_method(method, **OPTIONS.get(method, {}))
    )
    optimizer = torch.optim.SGD(module.parameters(), 0.02, momentum=0.9)
    options |= {"epochs": EPOCHS, "optimizer": optimizer, "progress": False, "accelerator": accelerator}
    options |= {"ema": 0.5, "clip_norm": 0.1} if method == "amd" else {}
    with mock.patch.object(stkd, "mixup", neighbours), mock.patch.object(alone, "mixup", neighbours):
        fit(module, loader(method, processes), **options)
    state = module.state_dict()
    assert all(isinstance(x, DTensor) == (accelerator is not None) for x in state.values())
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}


def sharded(method: str) -> dict[str, Tensor]:
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    # Accelerate takes its plug-in for GPUs alone; the rest of it does not mind
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    return trained(method, 2, accelerator, test_loader=loader(method, 2))


def work(rank: int, folder: Path) -> None:
    be_rank(rank, 2, str(folder))
    ends = {method: trained(method, 2) for method in METHODS}
    ends["sp cached"] = trained("sp", 2, teacher_cache=folder / "teacher")
    ends |= {f"{method} sharded": sharded(method) for method in SHARDED}
    torch.save(ends, folder / f"{rank}.pt")
    dist.barrier()  # no rank leaves while another still needs it
    sys.stdout.flush()
    os._exit(0)  # tearing gloo's threads down aborts a process that has done its work now and then
