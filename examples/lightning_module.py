"""Distillation with Lightning.

python examples/lightning_module.py    (pip install '.[lightning,train]')
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import digits
import torch
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from kdkernels.integrations.lightning import DistillationModule
from kdkernels.training import Distillation
from kdkernels.training.data import loader

Loader = DataLoader[Sequence[Tensor]]


def train(distillation: Distillation, batches: Loader, epochs: int, lr: float = 0.05, **options: Any) -> Trainer:
    """The optimizer and the schedule are those of kdkernels.training.fit; for others override configure_optimizers."""
    trainer = Trainer(max_epochs=epochs, default_root_dir="runs/lightning", log_every_n_steps=10, **options)
    trainer.fit(DistillationModule(distillation, lr=lr), batches)
    return trainer


def main() -> None:
    teacher, student, split = digits.networks_and_data()
    trainer = train(Distillation(teacher, student, "kd"), loader(split.train, 32, train=True), digits.STUDENT_EPOCHS)
    trainer.validate(dataloaders=loader(split.test, 500, train=False))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
