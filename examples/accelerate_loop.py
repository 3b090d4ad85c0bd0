"""Distillation in a loop of your own on Hugging Face Accelerate: any device, precision and number of processes.

python examples/accelerate_loop.py    (pip install '.[train]')
accelerate launch --num_processes 2 --cpu examples/accelerate_loop.py
"""

from __future__ import annotations

from collections.abc import Sequence

import digits
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from kdkernels.training import Distillation
from kdkernels.training.data import loader
from kdkernels.training.defaults import default_optimizer, default_scheduler
from kdkernels.training.evaluation import evaluate


def train(
    distillation: Distillation,
    batches: DataLoader[Sequence[Tensor]],
    epochs: int,
    accelerator: Accelerator,
    lr: float = 0.05,
) -> None:
    if distillation.method.relational and accelerator.num_processes > 1:
        distillation.method.group = dist.group.WORLD  # compare the rows of all processes' batches
    optimizer = default_optimizer(distillation.parameters(), lr)
    model, optimizer, batches = accelerator.prepare(distillation, optimizer, batches)
    steps = epochs * len(batches)
    scheduler = default_scheduler(optimizer, steps)
    model.train()
    for epoch in range(epochs):
        for i, batch in enumerate(batches):
            distillation.schedule((epoch * len(batches) + i) / steps)  # some methods' terms grow at first
            result = model(*batch)
            accelerator.backward(result.loss)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


def main() -> None:
    teacher, student, split = digits.networks_and_data()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    batches = loader(split.train, 32, train=True)
    train(Distillation(teacher, student, "sp"), batches, digits.STUDENT_EPOCHS, accelerator)
    if accelerator.is_main_process:
        print(f"student {evaluate(student, loader(split.test, 500, train=False)):.1f} %")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
