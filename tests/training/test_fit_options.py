"""fit's options: scheduler, clipping, averaged weights, trackers, what a test measures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.tracking import GeneralTracker
from checking import DEVICE
from safetensors.torch import load_file
from test_loop import recorded_steps
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.training import Callback, Distillation, fit, trackers
from kdkernels.training.evaluation import measure
from kdkernels.training.trackers import make_accelerator


def linear(classes: int = 10) -> Distillation:
    torch.manual_seed(0)
    return Distillation(None, nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), "alone")


def loader(classes: int = 10) -> DataLoader[Any]:
    x = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(20) % classes), 5)


@pytest.mark.parametrize("method", ["kd", "sp"])  # sp: all micro-batches as one batch
def test_gradients_are_clipped_once_per_step(method: str) -> None:
    free, clipped = recorded_steps(method, 8), recorded_steps(method, 8, clip_norm=1e-3)
    assert len(free) == len(clipped) == 2
    for whole, short in zip(free, clipped, strict=True):
        assert whole.norm() > 1e-2
        torch.testing.assert_close(short, whole * (1e-3 / whole.norm()), rtol=1e-3, atol=0.0)


def test_a_scheduler_of_ones_own_steps_once_per_step() -> None:
    def halved(optimizer: torch.optim.Optimizer, steps: int) -> LinearLR:
        assert steps == 6  # three epochs of four batches, two in a step
        return LinearLR(optimizer, 1.0, 0.0, steps)

    rows = fit(linear(), loader(), epochs=3, lr=0.3, accumulate=2, scheduler=halved, progress=False)
    assert [row["lr"] for row in rows] == pytest.approx([0.3, 0.2, 0.1])
    module = linear()
    optimizer = torch.optim.SGD(module.parameters(), 0.3)
    own = LinearLR(optimizer, 1.0, 0.0, 12)
    rows = fit(module, loader(), epochs=3, optimizer=optimizer, scheduler=own, progress=False)
    assert [row["lr"] for row in rows] == pytest.approx([0.3, 0.2, 0.1])


def test_a_scheduler_that_steps_nothing_is_refused() -> None:
    module = linear()
    optimizer, another = (torch.optim.SGD(module.parameters(), 0.1) for _ in range(2))
    for options, message in (
        ({"scheduler": LinearLR(optimizer)}, "belongs to an optimizer"),
        ({"scheduler": LinearLR(another), "optimizer": optimizer}, "of another optimizer"),
        ({"scheduler": ReduceLROnPlateau(optimizer), "optimizer": optimizer}, "without a metric, got ReduceLROn"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"ema": 1.0}, "ema must be between 0 and 1"),
        ({"trackers": "wand"}, "trackers: 'wand' is not among those that are installed"),
        ({"save_every": 0}, "save_every must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(module, loader(), epochs=1, progress=False, **options)


class Weights(Callback):
    """The student's own weights after each step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_step(self, training: Any, step: int, values: Any) -> None:
        self.steps.append(training.distillation.student[1].weight.detach().double().clone())


def test_averaged_weights_are_tested_saved_and_returned(tmp_path: Path) -> None:
    module, seen = linear(), Weights()
    average = module.student[1].weight.detach().double().to(DEVICE)
    options: dict[str, Any] = {"lr": 0.5, "ema": 0.3, "callbacks": [seen], "output": tmp_path, "progress": False}
    rows = fit(module, loader(), loader(), epochs=2, **options)
    for n, weights in enumerate(seen.steps, 1):
        decay = min(0.3, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weights
    assert len(seen.steps) == 8
    torch.testing.assert_close(module.student[1].weight.double(), average, rtol=1e-5, atol=1e-6)
    assert (seen.steps[-1] - average).abs().max() > 1e-3
    saved = load_file(tmp_path / "last.safetensors")["1.weight"]
    assert torch.equal(saved, module.student[1].weight.detach().cpu())
    assert rows[-1]["test_loss"] == pytest.approx(measure(module.student, loader())["loss"], rel=1e-6)


def test_what_a_test_measures() -> None:
    model = linear(12).student.to(DEVICE)
    x, y = (part.to(DEVICE) for part in loader(12).dataset.tensors)
    logits = model(x)
    measured = measure(model, loader(12))
    five = [int(y[i]) in logits[i].argsort(descending=True)[:5].tolist() for i in range(20)]
    assert measured["accuracy"] == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())
    assert measured["top5"] == pytest.approx(100 * sum(five) / 20)
    assert measured["loss"] == pytest.approx(F.cross_entropy(logits.double(), y).item(), rel=1e-6)
    assert measure(linear(5).student, loader(5)).keys() == {"accuracy", "loss"}  # of five classes all are the top five
    (row,) = fit(linear(12), loader(12), loader(12), epochs=1, progress=False)
    assert {"test_accuracy", "test_top5", "test_loss"} < row.keys()


class Recorder(GeneralTracker):
    name, requires_logging_directory = "recorder", False

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.config: dict[str, Any] = {}
        self.finished = 0
        super().__init__()

    @property
    def tracker(self) -> Recorder:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, dict(values)))

    def finish(self) -> None:
        self.finished += 1


def test_trackers_get_every_row() -> None:
    recorder = Recorder()
    rows = fit(linear(), loader(), epochs=2, trackers=recorder, progress=False)
    assert recorder.rows == [(4, rows[0]), (8, rows[1])]
    assert recorder.config["method"] == "alone"
    assert recorder.finished == 1
    assert math.isfinite(rows[0]["loss"])


@pytest.mark.parametrize(("installed", "expected"), [(True, ["tensorboard"]), (False, None)])
def test_tensorboard_is_the_default_where_it_is_installed(
    tmp_path: Path, installed: bool, expected: list[str] | None
) -> None:
    with (
        mock.patch.object(trackers, "is_tensorboard_available", return_value=installed),
        mock.patch.object(trackers, "get_available_trackers", return_value=["tensorboard"]),
        mock.patch.object(trackers, "Accelerator") as accelerator,
    ):
        make_accelerator("no", 1, None, tmp_path)
        assert accelerator.call_args.kwargs["log_with"] == expected
        make_accelerator("no", 1, None, None)  # nowhere to write to
        assert accelerator.call_args.kwargs["log_with"] is None
