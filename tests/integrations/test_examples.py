"""The examples run, and those with a loop of their own end with the student of kdkernels.training.fit."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import accelerate_loop
import digits
import plain_loop
import pytest
import timm_mixup
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from distilling import EPOCHS, LR, METHODS, SEED, check_same, fitted, loader, make
from torch import Tensor

from kdkernels import stkd_loss

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", METHODS)
def test_plain_loop(method: str) -> None:
    distillation = make(method)
    set_seed(SEED)
    plain_loop.train(distillation, loader(), EPOCHS, LR)
    check_same(distillation.cpu(), fitted(method))


@pytest.mark.parametrize("method", METHODS)
def test_accelerate_loop(method: str) -> None:
    distillation = make(method)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(SEED)
    accelerate_loop.train(distillation, loader(shuffle=True), EPOCHS, accelerator, LR)
    check_same(distillation, fitted(method, shuffle=True))


class TimmMixup:
    """timm.data.Mixup's mixup of a batch with itself in reverse, by its formula: timm needs torchvision."""

    def __init__(self, smoothing: float, classes: int) -> None:
        self.smoothing, self.classes = smoothing, classes
        self.lam = 1.0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.lam = float(torch.rand(()))
        one_hot = torch.nn.functional.one_hot(labels, self.classes).float()
        dense = (1 - self.smoothing) * one_hot + self.smoothing / self.classes
        return tuple(self.lam * x + (1 - self.lam) * x.flip(0) for x in (images, dense))


def test_timm_mixup() -> None:
    """Dense targets are the two labels and lam without label smoothing, and the formula with it."""
    labels, s, t = torch.randint(10, (8,)), torch.randn(8, 10), torch.randn(8, 10)
    mixup = TimmMixup(0.0, 10)
    dense = mixup(torch.empty(8, 1), labels)[1]
    torch.testing.assert_close(stkd_loss(s, t, dense), stkd_loss(s, t, labels, labels.flip(0), mixup.lam))
    mixup = TimmMixup(0.1, 10)
    dense = mixup(torch.empty(8, 1), labels)[1]
    log_q, log_p = torch.log_softmax(s / 4, 1), torch.log_softmax(s, 1)
    kl = torch.nn.functional.kl_div(log_q, torch.softmax(t / 4, 1), reduction="batchmean")
    torch.testing.assert_close(stkd_loss(s, t, dense), 0.1 * -(dense * log_p).sum(1).mean() + 0.9 * 16 * kl)

    distillation = make("stkd")
    before = distillation.student.fc.weight.detach().clone()
    timm_mixup.train(distillation.teacher, distillation.student, loader(), TimmMixup(0.1, 10), 1)
    assert not torch.equal(distillation.student.fc.weight, before)
    assert all(p.grad is None for p in distillation.teacher.parameters())


@pytest.fixture(scope="module")
def networks_and_data() -> tuple[Any, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "TEACHER_EPOCHS", 2)
        return digits.networks_and_data()


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop", "huggingface", "lightning_module"])
def test_examples_run(
    name: str,
    networks_and_data: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "networks_and_data", lambda: copy.deepcopy(networks_and_data))
    monkeypatch.setattr(digits, "STUDENT_EPOCHS", 2)
    importlib.import_module(name).main()
    words = capsys.readouterr().out.replace("│", " ").split()
    accuracy = float(words[words.index("val_accuracy") + 1] if "val_accuracy" in words else words[-2])
    assert accuracy > 50
