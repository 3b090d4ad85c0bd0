"""transformers' Trainer around a SequenceDistillation: the curve of whole logits, from a live and a cached teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checking import DEVICE
from sequence_tools import (
    BATCH,
    LR,
    ROWS,
    STEPS,
    VOCABULARY,
    by_whole_logits,
    counted,
    dense_loss,
    gpt2,
    llama,
    on_device,
    teacher,
)
from transformers import AutoModelForCausalLM, TrainingArguments

from kdkernels.integrations.hf import SequenceDistillationTrainer
from kdkernels.training import SequenceCollator, SequenceDistillation, TeacherCache, write_teacher_cache

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sequences")]

QUIET: dict[str, Any] = {"disable_tqdm": True, "report_to": [], "logging_steps": 1, "save_strategy": "no"}


def make_trainer(
    distillation: SequenceDistillation, folder: Path, rows: Any = ROWS, **options: Any
) -> SequenceDistillationTrainer:
    options = {"per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": LR} | QUIET | options
    arguments = TrainingArguments(
        str(folder),
        per_device_eval_batch_size=len(ROWS),
        optim="adamw_torch",
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        **options,
    )
    return SequenceDistillationTrainer(distillation, arguments, train_dataset=rows, eval_dataset=rows)


def curve(trainer: SequenceDistillationTrainer) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return write_teacher_cache(teacher(), ROWS, tmp_path_factory.mktemp("cache"), top_k=VOCABULARY)


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], dict[str, torch.Tensor]]:
    student = llama()
    return by_whole_logits(student), student.state_dict()


@pytest.mark.parametrize("kind", ["live", "cached", "accumulated", "checkpointed"])
def test_the_curve_is_that_of_whole_logits(
    kind: str, tmp_path: Path, cache: TeacherCache, expected: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    student = llama()
    options: dict[str, Any] = {}
    if kind == "accumulated":  # rows of unequal length, some with prompts: micro-batches of unequal numbers of tokens
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    elif kind == "checkpointed":
        options = {"gradient_checkpointing": True}
    cached = kind == "cached"
    distillation = SequenceDistillation(student, cache if cached else teacher())
    losses = curve(make_trainer(distillation, tmp_path, cache.join(ROWS) if cached else ROWS, **options))
    assert losses == pytest.approx(expected[0], rel=1e-4)
    assert losses[-1] < 0.8 * losses[0], "nothing was learned, and this test proves little"
    for name, value in expected[1].items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_tied_weights_a_temperature_and_labels(tmp_path: Path) -> None:
    options = {"temperature": 2.0, "ce_weight": 0.5}
    distillation = SequenceDistillation(gpt2(), teacher(), **options)
    losses = curve(make_trainer(distillation, tmp_path, max_steps=4))
    assert losses == pytest.approx(by_whole_logits(gpt2(), 4, **options), rel=1e-4)


def test_half_of_the_tokens_are_nearly_all(tmp_path: Path) -> None:
    """k below the vocabulary: what is left over is one bucket."""
    few = write_teacher_cache(teacher(), ROWS, tmp_path / "cache", top_k=VOCABULARY // 2)
    losses = curve(make_trainer(SequenceDistillation(llama(), few), tmp_path, few.join(ROWS), max_steps=4))
    whole = by_whole_logits(llama(), 4)
    assert losses == pytest.approx(whole, rel=0.05)
    assert losses[0] < whole[0], "merging tokens into one cannot add to a KL"


def test_evaluation_and_checkpoints_are_the_students(tmp_path: Path) -> None:
    student = llama()
    trainer = make_trainer(
        SequenceDistillation(student, teacher()), tmp_path, max_steps=2, save_strategy="steps", save_steps=2
    )
    trainer.train()
    batch = on_device(SequenceCollator()(ROWS))
    with torch.no_grad():
        loss = dense_loss(student.eval(), batch) / counted(batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").to(DEVICE)
    torch.testing.assert_close(saved(batch["input_ids"]).logits, student(batch["input_ids"]).logits)
    assert all(p.grad is None for p in teacher().parameters())


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needs a SequenceDistillation, got LlamaForCausalLM"):
        SequenceDistillationTrainer(llama())
    with pytest.raises(ValueError, match="give label_smoothing to SequenceDistillation"):
        make_trainer(SequenceDistillation(llama(), teacher()), tmp_path, label_smoothing_factor=0.1)
