"""Distillation in a loop of your own.

python examples/plain_loop.py    (pip install '.[train]', for the teacher's training and the data)
"""

from __future__ import annotations

from collections.abc import Sequence

import digits
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdkernels.training import Distillation
from kdkernels.training.data import loader
from kdkernels.training.defaults import default_optimizer, default_scheduler
from kdkernels.training.evaluation import evaluate


def train(distillation: Distillation, batches: DataLoader[Sequence[Tensor]], epochs: int, lr: float = 0.05) -> None:
    # distillation.parameters(), not only the student's: some methods also train heads
    optimizer = default_optimizer(distillation.parameters(), lr)
    steps = epochs * len(batches)
    scheduler = default_scheduler(optimizer, steps)
    distillation.train()
    for epoch in range(epochs):
        for i, (images, target) in enumerate(batches):
            distillation.schedule((epoch * len(batches) + i) / steps)  # some methods' terms grow at first
            loss = distillation(images, target).loss  # the result also has .terms and .logits
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()


def main() -> None:
    teacher, student, split = digits.networks_and_data()
    train(Distillation(teacher, student, "kd"), loader(split.train, 32, train=True), digits.STUDENT_EPOCHS)
    accuracy = [evaluate(model, loader(split.test, 500, train=False)) for model in (teacher, student)]
    print(f"teacher {accuracy[0]:.1f} %, student {accuracy[1]:.1f} %")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
