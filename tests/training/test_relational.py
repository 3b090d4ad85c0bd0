"""Methods that compare rows, over micro-batches and processes; methods with heads; native beside the reference."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE, backends_under_test
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_tools import images, network, plain

import kdkernels
from kdkernels.training import (
    Distillation,
    data,
    fit,
    make_method,
)
from kdkernels.training.exact import exact_step
from kdkernels.training.models import ConvNet, small_student


@pytest.mark.parametrize("method", ["sp", "mlkd", "kd"])
def test_micro_batches_are_one_batch(method: str) -> None:
    x, y = torch.randn(12, 1, 8, 8, dtype=torch.float64, device=DEVICE), torch.arange(12, device=DEVICE) % 4
    teacher, student = plain(8, 1), plain(6, 2)
    losses, gradients = [], []
    for parts in ([(x, y)], [(x[:5], y[:5]), (x[5:], y[5:])]):
        torch.manual_seed(3)  # mlkd's heads, whose batch norm sees the whole batch either way
        module = Distillation(teacher, student, method, example=x[:2]).double()
        student.zero_grad()
        losses.append(exact_step(module, parts, Tensor.backward, nullcontext).loss)
        gradients.append([p.grad.clone() for p in student.parameters()])
        if len(parts) == 1:
            torch.testing.assert_close(losses[0], module(x, y).loss.detach())
        module.close()
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_micro_batches_may_each_be_mixed() -> None:
    x, y = torch.randn(8, 1, 8, 8, dtype=torch.float64, device=DEVICE), torch.arange(8, device=DEVICE) % 4
    module = Distillation(plain(8, 1), plain(6, 2), "stkd")
    torch.manual_seed(0)
    together = exact_step(module, [(x[:4], y[:4]), (x[4:], y[4:])], Tensor.backward, nullcontext).loss
    torch.manual_seed(0)
    apart = [module(x[k], y[k]).loss.detach() for k in (slice(4), slice(4, None))]
    torch.testing.assert_close(together, sum(apart) / 2)


def test_fit_takes_micro_batches_of_a_relational_method_as_one_batch() -> None:
    weights = []
    for accumulate, batch in ((1, 64), (2, 32)):
        torch.manual_seed(0)
        teacher, student = plain(8, 1).float(), plain(6, 2).float()
        student.fc, teacher.fc = nn.Linear(6, 10), nn.Linear(8, 10)
        torch.manual_seed(1)
        nn.init.normal_(student.fc.weight)
        nn.init.zeros_(student.fc.bias)
        module = Distillation(teacher, student, make_method("sp", weight=10.0)).to(DEVICE)
        dataset = TensorDataset(*(x[:64] for x in data.digits().train.tensors))
        fit(module, DataLoader(dataset, batch), epochs=3, accumulate=accumulate, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["mlkd", "corsd"])
@pytest.mark.parametrize("with_example", [False, True])
def test_methods_with_heads_find_the_widths_and_train_them(method: str, with_example: bool) -> None:
    teacher, student, (x, y) = network(6, 7, 8), network(), images(6)
    teacher = None if method == "corsd" else teacher
    module = Distillation(teacher, student, method, example=x[:2] if with_example else None).to(DEVICE)
    result = module(x, y[:2], y[1:3]) if method == "corsd" else module(x, y)
    assert set(result.terms) == {"ce", method}
    result.loss.backward()
    heads = [p for name, p in module.named_parameters() if name.startswith("method.")]
    assert heads
    assert all(p.grad is not None for p in heads)
    assert set(module.eval()(x, y).terms) >= {"ce"}


def test_mlkd_sees_four_views_and_scores_the_upright_ones() -> None:
    teacher, student, (x, y) = network(6, 7, 8).eval(), network(), images(6)
    module = Distillation(teacher, student, "mlkd", example=x[:2])
    result = module(x, y)
    assert len(result.logits) == 24
    torch.testing.assert_close(result.terms["ce"], F.cross_entropy(result.logits[::4], y).detach())


def test_two_processes_from_the_command_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "kdkernels",
        "train",
    ]
    options = ["--method", "mlkd", "--epochs", "1", "--teacher-epochs", "1", "--per-class", "32"]
    options += ["--output", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert int(row["step"]) == 320 // 32 // 2  # each process sees its own half
    assert math.isfinite(float(row["mlkd"]))
    assert "rows are compared over the batches of all 2 processes" in done.stdout


def test_widths_that_cannot_be_read_off_need_an_example() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x], 1)

    student = nn.Sequential()
    for name, layer in {"stage1": Doubled(), "pool": nn.Flatten(), "fc": nn.Linear(128, 4)}.items():
        student.add_module(name, layer)
    x = torch.randn(3, 1, 8, 8, device=DEVICE)
    student, teacher = student.to(DEVICE), network(6, 7, 8)
    with pytest.raises(ValueError, match=r"MLKD has parameters of its own.*'stage1'.*example="):
        Distillation(teacher, student, "mlkd", layers=["stage1"], teacher_layers=["stages.2"])
    module = Distillation(teacher, student, "mlkd", layers=["stage1"], teacher_layers=["stages.2"], example=x)
    assert module(x, torch.tensor([0, 1, 2], device=DEVICE)).loss.isfinite()


def losses_of_50_steps(method: str, backend: str) -> list[float]:
    torch.manual_seed(0)
    x, y = data.digits().train.tensors
    teacher, student = ConvNet(1, 10, (8, 16, 32)).to(DEVICE), small_student(1, 10).to(DEVICE)
    options = {"sp": {"weight": 300.0}}
    module = Distillation(teacher, student, make_method(method, **options.get(method, {})))
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    losses = []
    with kdkernels.use_backend(backend):
        for step in range(50):
            index = torch.arange(32 * step, 32 * step + 32) % len(x)
            loss = module(x[index].to(DEVICE), y[index].to(DEVICE)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.skipif("native" not in backends_under_test(), reason="the native kernels are not available here")
@pytest.mark.parametrize("method", ["sp", "stkd", "amd"])
def test_50_steps_with_native_follow_the_reference(method: str) -> None:
    assert losses_of_50_steps(method, "native") == pytest.approx(losses_of_50_steps(method, "reference"), rel=1e-4)
