"""The folder of a run: not overwritten unasked, written whole or not at all, and what is saved is told."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kdkernels import cli
from kdkernels.training import Distillation, data, fit, loop, runs
from kdkernels.training.models import small_student
from kdkernels.training.runs import WriteError, saved


def train(folder: Path, epochs: int = 1, **options: object) -> Distillation:
    torch.manual_seed(0)
    module = Distillation(None, small_student(1, 10), "alone")
    dataset = TensorDataset(*(x[:64] for x in data.digits().train.tensors))
    loaders = DataLoader(dataset, 32), DataLoader(dataset, 64)
    fit(module, *loaders, epochs=epochs, output=folder, progress=False, **options)
    return module


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: writing more fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    train(tmp_path)
    before = contents(tmp_path)
    names = {"metrics.csv", "last.safetensors", "best.safetensors", "checkpoint-000001.safetensors"}
    assert before.keys() == names
    with (
        mock.patch.object(loop, "train_epoch", side_effect=AssertionError("it trains")),
        pytest.raises(
            FileExistsError,
            match=r"holds a run already \(metrics.csv, last.*resume=True, --resume.*overwrite=True, --overwrite",
        ),
    ):
        train(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "notes.txt").write_text("mine")
    train(tmp_path, epochs=2, overwrite=True)
    assert saved(tmp_path) == f"saved: {tmp_path} up to epoch 2"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_what_was_saved(tmp_path: Path) -> None:
    first = train(tmp_path)
    before = contents(tmp_path)
    size = len(before["last.safetensors"])
    with full_disk(size - 100), pytest.raises(WriteError, match=r"last.safetensors cannot be written: .*[Ff]ile too"):
        runs.save_student(tmp_path, small_student(1, 10), ["last"])
    with full_disk(40), pytest.raises(WriteError, match=r"metrics.csv cannot be written: File too large"):
        runs.save_metrics(tmp_path, [{"epoch": 2.0}] * 100)
    assert contents(tmp_path) == before
    weights = load_file(tmp_path / "last.safetensors")
    assert torch.equal(weights["fc.weight"], first.student.fc.weight.detach().cpu())


def run(folder: Path, *options: str) -> int:
    common = ["train", "--method", "alone", "--per-class", "8", "--epochs", "4", "--output", str(folder)]
    return cli.main([*common, *options])


def test_ctrl_c_and_a_full_disk_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []
    measure = loop.measure

    def interrupted(*args: object, **options: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args, **options)

    with mock.patch.object(loop, "measure", interrupted):
        assert run(tmp_path / "a") == 130
    assert (
        capsys.readouterr().err
        == f"kdkernels train: interrupted; saved: {tmp_path}/a up to epoch 2; --resume goes on from there\n"
    )
    whole = tmp_path / "whole"
    assert run(tmp_path / "a", "--resume") == run(whole) == 0
    assert (whole / "last.safetensors").read_bytes() == (tmp_path / "a" / "last.safetensors").read_bytes()
    assert "up to epoch 4" in saved(tmp_path / "a")
    capsys.readouterr()
    assert run(whole, "--resume", "--overwrite") == run(whole, "--resume", "--lr", "0.2") == 2
    together, other = capsys.readouterr().err.splitlines()
    assert together.endswith("give one of them")
    assert other == "kdkernels train: the run to resume has other settings: lr [0.1] (asked: [0.2])"
    with full_disk(1000):
        assert run(tmp_path / "b") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "last.safetensors cannot be written" in line
    assert line.endswith(f"; nothing was saved in {tmp_path}/b")


def test_what_of_a_run_that_diverged_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def nan(self: object, *args: object) -> dict[str, Tensor]:
        return {"ce": torch.tensor(torch.nan, requires_grad=True)}

    with mock.patch("kdkernels.training.methods.alone.Alone.terms", nan):
        assert run(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kdkernels train: the loss is not finite at step 1 (epoch 1, batch 1 of 2): ce")
    assert line.endswith(f"; nothing was saved in {tmp_path}")


def test_many_runs_are_counted(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "metrics.csv").write_text("epoch\n1\n")
    assert saved(tmp_path) == f"4 runs are saved under {tmp_path}"
    assert saved(tmp_path / "0") == f"saved: {tmp_path / '0'} up to epoch 1"
