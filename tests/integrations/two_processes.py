"""What two processes do: each trainer on its half of the batches; the students go to a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import be_rank
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kdkernels.training import Distillation, make_method
from kdkernels.training.defaults import default_optimizer, default_scheduler

BATCH, STEPS, LR = 16, 4, 0.05


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(BATCH * STEPS, 9, generator=generator), torch.arange(BATCH * STEPS) % 3)


def make() -> Distillation:
    """No batch norm, whose statistics are each process's own."""
    torch.manual_seed(0)
    models = []
    for width in (7, 5):
        model = nn.Sequential()
        model.add_module("layer1", nn.Linear(9, width))
        model.add_module("fc", nn.Sequential(nn.Tanh(), nn.Linear(width, 3)))
        models.append(model)
    return Distillation(*models, make_method("sp", weight=100))


def with_transformers(folder: str) -> Distillation:
    from transformers import TrainingArguments

    from kdkernels.integrations.hf import DistillationTrainer

    distillation = make()
    optimizer = default_optimizer(distillation.parameters(), LR)
    options: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "report_to": []}
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH // 2,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        max_grad_norm=0,
        use_cpu=True,
        ddp_backend="gloo",
        **options,
    )
    rows = [{"x": x, "labels": y} for x, y in zip(*dataset().tensors, strict=True)]
    scheduler = default_scheduler(optimizer, STEPS)
    DistillationTrainer(distillation, arguments, train_dataset=rows, optimizers=(optimizer, scheduler)).train()
    return distillation


def with_lightning() -> Distillation:
    from lightning import Trainer

    from kdkernels.integrations.lightning import DistillationModule

    distillation = make()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    trainer = Trainer(max_epochs=1, use_distributed_sampler=False, **options)  # Lightning's own would shuffle
    sampler = DistributedSampler(dataset(), 2, int(os.environ["RANK"]), shuffle=False)
    trainer.fit(DistillationModule(distillation, LR), DataLoader(dataset(), BATCH // 2, sampler=sampler))
    return distillation


def with_language_models(folder: str) -> Any:
    """Rows of unequal length, some with prompts: each process has another number of tokens."""
    from sequence_tools import BATCH, LR, ROWS, STEPS, gpt2, teacher
    from transformers import TrainingArguments

    from kdkernels.integrations.hf import SequenceDistillationTrainer
    from kdkernels.training import SequenceDistillation

    distillation = SequenceDistillation(gpt2(), teacher(), ce_weight=0.5)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH // 2,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        ddp_backend="gloo",
        save_strategy="no",
        report_to=[],
    )
    SequenceDistillationTrainer(distillation, arguments, train_dataset=ROWS).train()
    return distillation


RUNS = {"hf": with_transformers, "lightning": lambda folder: with_lightning(), "language": with_language_models}


def work(rank: int, folder: str) -> None:
    be_rank(rank, 2, folder)
    for name, run in RUNS.items():
        distillation = run(folder)
        assert dist.get_world_size() == 2
        torch.save(distillation.student.state_dict(), Path(folder) / f"{name}-{rank}.pt")
    dist.barrier()  # no rank leaves while another still needs it
    sys.stdout.flush()
    os._exit(0)  # tearing gloo's threads down aborts a process that has done its work now and then
