"""Distillation with transformers' Trainer.

python examples/huggingface.py    (pip install '.[hf,train]')

kdkernels.integrations.hf.Logits makes a transformers model return logits:
Distillation(Logits(teacher), Logits(student), "kd").
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import digits
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from transformers import EvalPrediction, TrainingArguments

from kdkernels.integrations.hf import DistillationTrainer
from kdkernels.training import Distillation
from kdkernels.training.defaults import default_optimizer, default_scheduler


class Rows(Dataset[dict[str, Tensor]]):
    """Items as transformers needs them: dicts with the labels under "labels"."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.dataset[index]
        return {"pixel_values": image, "labels": label}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(
    distillation: Distillation,
    dataset: TensorDataset,
    epochs: int,
    output: str | Path,
    lr: float = 0.05,
    seed: int = 0,
    **options: Any,
) -> DistillationTrainer:
    """With the optimizer and schedule of kdkernels.training.fit; without ``optimizers`` transformers uses AdamW."""
    arguments = TrainingArguments(
        str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=500,
        max_grad_norm=0,  # transformers clips gradients at 1 by default
        report_to=[],
        seed=seed,
        **options,
    )
    optimizer = default_optimizer(distillation.parameters(), lr)
    scheduler = default_scheduler(optimizer, epochs * math.ceil(len(dataset) / 32))
    trainer = DistillationTrainer(
        distillation,
        arguments,
        train_dataset=Rows(dataset),
        optimizers=(optimizer, scheduler),
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer


def main() -> None:
    teacher, student, split = digits.networks_and_data()
    trainer = train(Distillation(teacher, student, "kd"), split.train, digits.STUDENT_EPOCHS, "runs/huggingface")
    print(f"student {trainer.evaluate(Rows(split.test))['eval_accuracy']:.1f} %")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
