"""fit: metrics, checkpoints, seeds, accumulation, precision, what it refuses."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checking import DEVICE
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from training_tools import images, loaders, make, network, plain

from kdkernels.training import (
    Distillation,
    data,
    fit,
    make_method,
)
from kdkernels.training.evaluation import evaluate
from kdkernels.training.models import small_student
from kdkernels.training.trackers import make_accelerator


def test_fit_writes_metrics_and_checkpoints(tmp_path: Path) -> None:
    module = make()
    train, test = loaders()
    history = fit(module, train, test, epochs=4, eval_every=2, output=tmp_path, progress=False)
    assert [row["step"] for row in history] == [3, 6, 9, 12]
    assert ["test_accuracy" in row for row in history] == [False, True, False, True]
    assert all(math.isclose(row["loss"], row["ce"] + row["kd"], rel_tol=1e-5) for row in history)
    assert history[-1]["loss"] < history[0]["loss"]
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in history]
    last = small_student(1, 10)
    load_model(last, str(tmp_path / "last.safetensors"))
    for name, value in last.state_dict().items():
        assert torch.equal(value, module.student.state_dict()[name].cpu()), name
    best = small_student(1, 10)
    load_model(best, str(tmp_path / "best.safetensors"))
    assert evaluate(best.to(DEVICE), test) == pytest.approx(max(row.get("test_accuracy", 0) for row in history))


def test_fit_learns_and_repeats_under_a_seed() -> None:
    runs = []
    for _ in range(2):
        module = make("alone")
        train, test = loaders(960)
        history = fit(module, train, test, epochs=3, seed=5, progress=False)
        runs.append([(row["loss"], row.get("test_accuracy")) for row in history])
    assert runs[0] == runs[1]
    assert runs[0][-1][1] > 75


def test_fit_accumulates_micro_batches() -> None:
    weights = []
    for accumulate, batch in ((1, 64), (2, 32)):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # no batch norm: it would see the micro-batches
        module = Distillation(None, student, "alone")
        dataset = TensorDataset(*(x[:64] for x in data.digits().train.tensors))
        fit(module, DataLoader(dataset, batch), epochs=2, accumulate=accumulate, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in module.student.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def recorded_steps(method: str, batches: int, interrupt_at: int | None = None, **options: object) -> list[Tensor]:
    """The gradient of every optimizer step of an epoch with accumulate=4 over equal batches."""
    gradients: list[Tensor] = []

    class Recorder(torch.optim.SGD):
        def step(self, *args: object, **kwargs: object) -> None:
            gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))

    teacher, student = plain(8, 1).float(), plain(6, 2).float()
    calls: list[int] = []

    def count(*_: object) -> None:
        calls.append(1)
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt

    student.register_forward_pre_hook(count)
    torch.manual_seed(0)
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    loader = DataLoader(TensorDataset(x.repeat(batches, 1, 1, 1), y.repeat(batches)), 4)
    module = Distillation(teacher, student, method)
    fit(module, loader, epochs=1, optimizer=Recorder(student.parameters()), accumulate=4, progress=False, **options)
    return gradients


def test_a_partial_accumulation_window_weighs_as_much_as_a_whole_one() -> None:
    whole, partial = recorded_steps("kd", 5)
    torch.testing.assert_close(whole, partial)


@pytest.mark.parametrize("method", ["kd", "sp"])
def test_a_run_after_an_interrupted_one_steps_as_ever(method: str) -> None:
    expected = recorded_steps(method, 8)
    accelerator = make_accelerator("no", 4)
    with pytest.raises(KeyboardInterrupt):
        recorded_steps("kd", 8, interrupt_at=2, accelerator=accelerator)
    gradients = recorded_steps(method, 8, accelerator=accelerator)
    assert len(gradients) == 2
    torch.testing.assert_close(gradients, expected)


def test_evaluate_leaves_accumulation_alone() -> None:
    accelerator = make_accelerator("no", 4)
    evaluate(network(), DataLoader(TensorDataset(*images())))
    assert accelerator.gradient_accumulation_steps == 4


def test_checkpoints_of_a_compiled_student_load_into_a_plain_one(tmp_path: Path) -> None:
    student = torch.compile(small_student(1, 10), backend="eager")
    fit(Distillation(None, student, "alone"), loaders()[0], epochs=1, output=tmp_path, progress=False)
    load_model(small_student(1, 10), str(tmp_path / "last.safetensors"))


@pytest.mark.parametrize("name", ["epochs", "eval_every", "accumulate"])
def test_fit_names_numbers_below_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        fit(make(), *loaders(), **({"epochs": 1} | {name: 0}))


def test_fit_wants_loaders_with_batches() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            yield torch.zeros(1, 8, 8), 0

    train, _ = loaders()
    empty = DataLoader(TensorDataset(*images(0)))
    with pytest.raises(ValueError, match="test_loader has no batches"):
        fit(make(), train, empty, epochs=1)
    with pytest.raises(ValueError, match="no images"):
        evaluate(network(), empty)
    with pytest.raises(TypeError, match="train_loader must have a length"):
        fit(make(), DataLoader(Stream()), epochs=1)


def test_weights_out_of_range_are_refused() -> None:
    for method, options in (
        ("kd", {"weight": 3.0}),
        ("kd", {"weight": -0.1}),
        ("sp", {"weight": math.nan}),
        ("amd", {"weight": -1.0}),
        ("amd", {"kd_weight": 1.5}),
        ("stkd", {"ce_weight": -1.0}),
        ("mlkd", {"supervised_weight": -1.0}),
        ("nkd", {"weight": -1.0}),
        ("dist", {"weight": -1.0}),
        ("mlld", {"kd_weight": -1.0}),
    ):
        with pytest.raises(ValueError, match=rf"{method.upper()}: {next(iter(options))} must be .*, got"):
            make_method(method, **options)


def test_fit_stops_at_a_loss_that_is_not_a_number() -> None:
    train, _ = loaders()
    module = make("alone")
    with torch.no_grad():
        module.student.fc.weight[0, 0] = math.nan
    before = [p.detach().clone() for p in module.student.parameters()]
    with pytest.raises(FloatingPointError, match=r"step 1 \(epoch 1, batch 1 of 3\): ce \(loss nan, ce nan"):
        fit(module, train, epochs=2, progress=False)
    torch.testing.assert_close(list(module.student.parameters()), before, equal_nan=True)


def test_the_step_that_is_not_finite_is_named() -> None:
    x, y = images(12)
    x[9] = math.inf  # in the third of the batches of four, which is the second of two micro-batches
    module = Distillation(network(6, 7, 8), network(), "kd")
    loader = DataLoader(TensorDataset(x.cpu(), y.cpu()), 4)
    with pytest.raises(FloatingPointError, match=r"step 2 \(epoch 1, batch 3 of 3\): ce, kd .*weights are those"):
        fit(module, loader, epochs=2, accumulate=2, progress=False)
    assert all(p.isfinite().all() for p in module.student.parameters())


def test_frozen_parts_of_the_student_stay_frozen() -> None:
    module = make()
    frozen = module.student.stages[0]
    frozen.eval()
    before = frozen[1].running_mean.clone(), module.student.stages[1][1].running_mean.clone()
    fit(module, *loaders(32), epochs=2, progress=False)
    assert torch.equal(frozen[1].running_mean.cpu(), before[0])
    assert not torch.equal(module.student.stages[1][1].running_mean.cpu(), before[1])
    assert not module.eval().train().student.stages[0].training
    assert module.student.training
    frozen.train()
    assert module.train().student.stages[0].training


def test_bf16_training_runs_on_fp32_losses() -> None:
    train, test = loaders()
    history = fit(make("sp"), train, test, epochs=2, mixed_precision="bf16", progress=False)
    assert all(math.isfinite(row["loss"]) for row in history)
