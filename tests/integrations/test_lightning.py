"""Lightning around a Distillation: real runs on digits, held against kdkernels.training.fit."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import lightning_module
import pytest
import torch
from distilling import BATCH, DATASET, EPOCHS, IMAGES, LR, METHODS, SEED, check_same, fitted, loader, make
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from kdkernels.integrations.lightning import DistillationModule
from kdkernels.training import Distillation, make_method

pytestmark = pytest.mark.slow

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def train(distillation: Distillation, triplets: bool = False, **options: Any) -> Trainer:
    seed_everything(SEED, verbose=False)
    options = QUIET | {"enable_checkpointing": False} | options
    return lightning_module.train(distillation, loader(triplets=triplets), EPOCHS, LR, **options)


@pytest.mark.parametrize("method", [*METHODS, "corsd"])
def test_the_student_is_that_of_fit(method: str) -> None:
    """In the data's own order: from the second epoch on Lightning draws other ones from a shuffling loader than fit."""
    distillation = make(method)
    train(distillation, method == "corsd")
    check_same(distillation, fitted(method, triplets=method == "corsd"))


def test_gradient_accumulation_of_whole_windows() -> None:
    distillation = make("kd")
    trainer = train(distillation, accumulate_grad_batches=5)  # Lightning would weigh a part of a window as a part
    assert trainer.global_step == EPOCHS
    check_same(distillation, fitted("kd", accumulate=5))


def test_relational_methods_refuse_micro_batches() -> None:
    with pytest.raises(ValueError, match="MLKD compares the rows of a batch, and 2 micro-batches are not one"):
        train(make("mlkd"), accumulate_grad_batches=2)


def test_checkpoints_have_the_student_and_the_heads_and_training_resumes(tmp_path: Path) -> None:
    whole = make("mlkd")
    train(whole, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)])
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"distillation.{name}" for name in whole.state_dict()}
    assert max(value.shape[0] for name, value in saved.items() if ".student." in name and value.dim()) == 16
    assert "distillation.method.loss.e_s.weight" in saved
    loaded = make("mlkd")
    DistillationModule.load_from_checkpoint(tmp_path / "epoch=1.ckpt", distillation=loaded)
    check_same(loaded, whole)

    resumed = make("mlkd")
    trainer = Trainer(max_epochs=EPOCHS, enable_checkpointing=False, **QUIET)
    trainer.fit(DistillationModule(resumed, LR), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    check_same(resumed, whole)


def test_the_heads_are_trained_and_the_teacher_is_not() -> None:
    distillation = make("mlkd")
    distillation.student.eval()  # as an evaluation may have left it
    distillation.eval()
    teacher = {name: value.clone() for name, value in distillation.teacher.state_dict().items()}
    heads = [p.detach().clone() for p in distillation.method.parameters()]
    train(distillation)
    assert heads
    assert all(not torch.equal(a, b.cpu()) for a, b in zip(heads, distillation.method.parameters(), strict=True))
    assert all(p.grad is None for p in distillation.teacher.parameters())
    assert not distillation.teacher.training
    for name, value in distillation.teacher.state_dict().items():
        assert torch.equal(value.cpu(), teacher[name]), name
    check_same(distillation, fitted("mlkd"))  # so it was put in training mode


def test_terms_and_validation_are_logged() -> None:
    distillation = make("stkd")
    trainer = train(distillation, limit_train_batches=1)
    assert trainer.logged_metrics.keys() == {"loss", "stkd"}
    assert trainer.logged_metrics["loss"] == trainer.logged_metrics["stkd"] > 0
    (metrics,) = trainer.validate(DistillationModule(distillation), loader(), verbose=False)
    images, target = (x.to(next(distillation.student.parameters()).device) for x in DATASET.tensors)
    with torch.no_grad():
        expected = distillation.eval()(images, target)  # in evaluation nothing is mixed
    assert metrics["val_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    hits = (expected.logits.argmax(1) == target).sum().item()
    assert metrics["val_accuracy"] == pytest.approx(100 * hits / IMAGES)
    logits = DistillationModule(distillation)(images)
    torch.testing.assert_close(logits, distillation.student(images))


def test_weights_follow_their_schedule() -> None:
    method = make_method("kd", weight=lambda share: 0.5 * share)
    train(make(method))
    steps = EPOCHS * IMAGES // BATCH
    assert method.weight == pytest.approx(0.5 * (steps - 1) / steps)  # that of the last step


def test_an_optimizer_without_the_heads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def configure_optimizers(self: DistillationModule) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.distillation.student.parameters(), LR)

    monkeypatch.setattr(DistillationModule, "configure_optimizers", configure_optimizers)
    with pytest.raises(ValueError, match="the optimizer misses parameters of MLKD's own heads"):
        train(make("mlkd"))


def test_no_distillation_is_refused() -> None:
    with pytest.raises(TypeError, match="needs a Distillation, got Linear"):
        DistillationModule(nn.Linear(2, 2))


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "kdkernels.integrations.lightning")
    with pytest.raises(ImportError, match=r"pip install '\.\[lightning\]'"):
        importlib.import_module("kdkernels.integrations.lightning")
