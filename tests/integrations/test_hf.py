"""transformers' Trainer around a Distillation: real runs on digits, held against kdkernels.training.fit."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import huggingface
import pytest
import torch
from distilling import BATCH, DATASET, EPOCHS, IMAGES, LR, METHODS, SEED, check_same, fitted, make
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import kdkernels
from kdkernels.integrations.hf import DistillationTrainer, Logits
from kdkernels.training import Distillation, make_method
from kdkernels.training.defaults import default_optimizer, default_scheduler
from kdkernels.training.triplets import TripletDataset, collate_triplets

pytestmark = pytest.mark.slow

QUIET: dict[str, Any] = {"save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}


def train(distillation: Distillation, folder: Path, **options: Any) -> DistillationTrainer:
    return huggingface.train(distillation, DATASET, EPOCHS, folder, LR, SEED, **(QUIET | options))


@pytest.mark.parametrize("method", METHODS)
def test_the_student_is_that_of_fit(method: str, tmp_path: Path) -> None:
    """Shuffled, and mixed by stkd: use_seedable_sampler=False is what makes transformers draw the order as fit does."""
    distillation = make(method)
    train(distillation, tmp_path, accelerator_config={"use_seedable_sampler": False})
    check_same(distillation, fitted(method, shuffle=True))


def test_triplets(tmp_path: Path) -> None:
    distillation = make("corsd")
    names = ("pixel_values", "labels", "labels_neg")
    options = {"train_sampling_strategy": "sequential", "max_grad_norm": 0, "report_to": [], "seed": SEED} | QUIET
    optimizer = default_optimizer(distillation.parameters(), LR)
    trainer = DistillationTrainer(
        distillation,
        TrainingArguments(str(tmp_path), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, **options),
        train_dataset=TripletDataset(DATASET, DATASET.tensors[1]),
        data_collator=lambda samples: dict(zip(names, collate_triplets(samples), strict=True)),
        optimizers=(optimizer, default_scheduler(optimizer, EPOCHS * IMAGES // BATCH)),
    )
    trainer.train()
    check_same(distillation, fitted("corsd", triplets=True))


def test_gradient_accumulation(tmp_path: Path) -> None:
    """Five micro-batches in windows of two: the last one is not whole, and weighs as much."""
    distillation = make("kd")
    optimizer = default_optimizer(distillation.parameters(), LR)
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        max_grad_norm=0,
        report_to=[],
        seed=SEED,
        **QUIET,
    )
    steps = EPOCHS * math.ceil(IMAGES / BATCH / 2)
    schedule = default_scheduler(optimizer, steps)
    trainer = DistillationTrainer(
        distillation, arguments, train_dataset=huggingface.Rows(DATASET), optimizers=(optimizer, schedule)
    )
    assert trainer.train().global_step == steps
    check_same(distillation, fitted("kd", accumulate=2))


def test_relational_methods_refuse_micro_batches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SP compares the rows of a batch, and 2 micro-batches are not one"):
        train(make("sp"), tmp_path, gradient_accumulation_steps=2)


def test_checkpoints_have_the_student_and_the_heads_and_training_resumes(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "train_sampling_strategy": "sequential"}
    whole = make("mlkd")
    train(whole, tmp_path, **options)
    checkpoint = tmp_path / f"checkpoint-{IMAGES // BATCH}"
    saved = load_file(checkpoint / "model.safetensors")
    assert saved.keys() == whole.state_dict().keys()
    assert {name.split(".")[0] for name in saved} == {"student", "method"}
    assert "method.loss.e_s.weight" in saved
    widest = max(value.shape[0] for name, value in saved.items() if name.startswith("student.") and value.dim())
    assert widest == 16, "the teacher has 128 channels"

    resumed = make("mlkd")
    optimizer = default_optimizer(resumed.parameters(), LR)
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        max_grad_norm=0,
        report_to=[],
        seed=SEED,
        **(QUIET | options),
    )
    schedule = default_scheduler(optimizer, EPOCHS * IMAGES // BATCH)
    trainer = DistillationTrainer(
        resumed, arguments, train_dataset=huggingface.Rows(DATASET), optimizers=(optimizer, schedule)
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    check_same(resumed, whole)


def test_transformers_own_optimizer_trains_the_heads_and_leaves_the_teacher(tmp_path: Path) -> None:
    distillation = make("mlkd")
    teacher = {name: value.clone() for name, value in distillation.teacher.state_dict().items()}
    heads = [p.detach().clone() for p in distillation.method.parameters()]
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=1, report_to=[], **QUIET)
    DistillationTrainer(distillation, arguments, train_dataset=huggingface.Rows(DATASET)).train()
    assert heads
    assert all(not torch.equal(a, b.cpu()) for a, b in zip(heads, distillation.method.parameters(), strict=True))
    assert all(p.grad is None for p in distillation.teacher.parameters())
    assert not distillation.teacher.training
    for name, value in distillation.teacher.state_dict().items():
        assert torch.equal(value.cpu(), teacher[name]), name


def test_evaluation_is_the_students(tmp_path: Path) -> None:
    distillation = make("stkd")  # in evaluation nothing is mixed
    trainer = train(distillation, tmp_path)
    rows = huggingface.Rows(DATASET)
    images, target = (x.to(trainer.args.device) for x in DATASET.tensors)
    prediction = trainer.predict(rows)
    with torch.no_grad():
        expected = distillation.eval()(images, target)
    torch.testing.assert_close(torch.as_tensor(prediction.predictions), expected.logits.cpu(), rtol=1e-5, atol=1e-5)
    metrics = trainer.evaluate(rows)
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    accuracy = 100 * (expected.logits.argmax(1) == target).float().mean().item()
    assert metrics["eval_accuracy"] == pytest.approx(accuracy) == prediction.metrics["test_accuracy"]


def sentence(index: int) -> dict[str, Tensor]:
    words = (torch.arange(6) * (index + 1)) % 20
    return {"input_ids": words, "attention_mask": (torch.arange(6) < 4).long(), "labels": torch.tensor(index % 3)}


SENTENCES = [sentence(i) for i in range(16)]


def bert(width: int) -> nn.Module:
    config = BertConfig(
        vocab_size=20, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    return Logits(BertForSequenceClassification(config))


def test_transformers_models_and_several_inputs(tmp_path: Path) -> None:
    teacher, student = bert(8), bert(4)
    distillation = Distillation(teacher, student, "kd")
    before = student.model.classifier.weight.detach().clone()
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=1, learning_rate=0.01, report_to=[], **QUIET)
    trainer = DistillationTrainer(distillation, arguments, train_dataset=SENTENCES, eval_dataset=SENTENCES)
    trainer.train()
    assert not torch.equal(student.model.classifier.weight.cpu(), before)

    batch = {name: torch.stack([row[name] for row in SENTENCES]) for name in ("input_ids", "attention_mask")}
    batch = {name: x.to(trainer.args.device) for name, x in batch.items()}
    labels = torch.arange(16, device=trainer.args.device) % 3
    with torch.no_grad():
        z_s, z_t = (m.eval().model(**batch).logits for m in (student, teacher))
        unmasked = student.model(batch["input_ids"]).logits
    expected = 0.1 * nn.functional.cross_entropy(z_s, labels) + 0.9 * kdkernels.kd_loss(z_s, z_t)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert not torch.allclose(z_s, unmasked), "the mask does nothing, and this test proves nothing"
    torch.testing.assert_close(student(batch["input_ids"]), unmasked)  # one tensor goes in as it is


def test_weights_follow_their_schedule(tmp_path: Path) -> None:
    method = make_method("kd", weight=lambda share: 0.5 * share)
    train(make(method), tmp_path)
    steps = EPOCHS * IMAGES // BATCH
    assert method.weight == pytest.approx(0.5 * (steps - 1) / steps)  # that of the last step


def test_an_optimizer_without_the_heads_is_refused(tmp_path: Path) -> None:
    distillation = make("mlkd")
    optimizers = (default_optimizer(distillation.student.parameters(), LR), None)
    with pytest.raises(ValueError, match="the optimizer misses parameters of MLKD's own heads"):
        DistillationTrainer(distillation, TrainingArguments(str(tmp_path), report_to=[]), optimizers=optimizers)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="needs a Distillation, got Linear"):
        DistillationTrainer(nn.Linear(2, 2))
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"one GPU per process, and this process has 2: .*torchrun"):
        DistillationTrainer(make("kd"), TrainingArguments(str(tmp_path), report_to=[]))


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "kdkernels.integrations.hf")
    with pytest.raises(ImportError, match=r"pip install '\.\[hf\]'"):
        importlib.import_module("kdkernels.integrations.hf")
