"""A run that was killed and resumed ends as one that was not; what is cut or full is told and skipped."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from states import differing, unlike
from test_runs import contents
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.training import Callback, Distillation, checkpoints, fit, runs
from kdkernels.training.checkpoints import CheckpointError
from kdkernels.training.runs import WriteError

pytestmark = pytest.mark.slow

KILLED = Path(__file__).with_name("killed.py")
METHODS = ("kd", "sp", "mlkd", "corsd")


def test_killed_at_random_moments_and_resumed_is_bitwise_the_same(tmp_path: Path) -> None:
    command = [sys.executable, str(KILLED), str(tmp_path), "3", *METHODS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    deaths = dict(line.split() for line in done.stdout.splitlines())
    for method in METHODS:
        assert int(deaths[method]) >= 2, deaths  # the last may come after the end
        whole, killed = tmp_path / method / "whole", tmp_path / method / "killed"
        assert unlike(whole, killed) == [], method
        assert len((killed / "metrics.csv").read_text().splitlines()) == 5
    weights = checkpoints.read(checkpoints.found(tmp_path / "mlkd" / "whole")[0])["weights"]
    assert any(name.startswith("method.") for name in weights)


STATE = {
    "weights": {"fc": torch.arange(6.0).view(2, 3).t(), "half": torch.ones(3, dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    "nothing": None,
    "empty": [],
    "text": "list",
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tied = torch.ones(4)
    state = STATE | {"tied": [tied, tied, tied[:2]]}
    checkpoints.write(tmp_path, 1, state)
    again = checkpoints.read(checkpoints.found(tmp_path)[0])
    assert differing(state, again) == []
    assert isinstance(again["optimizer"]["groups"][0]["betas"], tuple)
    for epoch in (2, 3):
        checkpoints.write(tmp_path, epoch, STATE)
    assert [path.name for path in checkpoints.found(tmp_path)] == [f"checkpoint-00000{i}.safetensors" for i in (3, 2)]
    with pytest.raises(TypeError, match=r"state.f is a function, which a checkpoint cannot hold"):
        checkpoints.write(tmp_path, 4, {"f": fit})


def test_of_a_checkpoint_cut_at_any_byte_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (1, 2):
        checkpoints.write(tmp_path, epoch, {"weight": torch.arange(2.0), "epoch": epoch})
    path, before = checkpoints.found(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        caplog.clear()
        assert checkpoints.newest(tmp_path) == before
        (line,) = caplog.messages
        assert line.startswith(f"{path} is no whole checkpoint: ")
        assert line.endswith("; the one before it is taken")
    path.write_bytes(whole)
    assert checkpoints.newest(tmp_path) == path


def test_a_checkpoint_with_any_byte_changed_is_refused(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, 1, {"weight": torch.arange(2.0), "epoch": 1})
    (path,) = checkpoints.found(tmp_path)
    whole = path.read_bytes()
    expected = checkpoints.read(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            same = differing(checkpoints.read(path), expected) == []
        except CheckpointError:
            continue
        assert same, (place, whole[place : place + 1])  # a space of the padding, for one


def train(folder: Path, epochs: int = 3, **options: Any) -> Distillation:
    torch.manual_seed(0)
    module = Distillation(None, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "alone")
    loader = DataLoader(TensorDataset(torch.randn(12, 1, 8, 8), torch.arange(12) % 10), 4, shuffle=True)
    fit(module, loader, loader, epochs=epochs, output=folder, progress=False, **options)
    return module


def test_the_checkpoint_before_a_damaged_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = train(tmp_path)
    newest, before = checkpoints.found(tmp_path)
    end = newest.read_bytes()
    newest.write_bytes(end[:-5])
    with caplog.at_level(logging.WARNING, logger="kdkernels"):
        resumed = train(tmp_path, resume=True)
    assert "checkpoint-000003.safetensors is no whole checkpoint" in caplog.text
    assert "the one before it is taken" in caplog.text
    assert torch.equal(whole.student[1].weight, resumed.student[1].weight)
    newest.write_bytes(end[:-5])
    before.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"000002.safetensors is no whole .*has no other that is: overwrite"):
        train(tmp_path, resume=True)


def full_at(call: int) -> tuple[ExitStack, list[str]]:
    """The disk is full at that call of all that write, flush or rename; before it fails, a write has done half."""
    calls: list[str] = []

    def failing(name: str, real: Any, file: int | None = None) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) != call:
                return real(*args, **kwargs)
            if file is not None:
                real(*args, **kwargs)
                path = Path(args[file])
                os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return run

    stack = ExitStack()
    for owner, name, file in (
        (safetensors.torch, "save_model", 1),
        (checkpoints, "save_file", 1),
        (runs, "_table", 0),
        (os, "fsync", None),
        (Path, "replace", None),
    ):
        stack.enter_context(mock.patch.object(owner, name, failing(name, getattr(owner, name), file)))
    return stack, calls


def test_a_full_disk_at_any_moment_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    stack, calls = full_at(0)
    with stack:
        whole = train(tmp_path / "whole", epochs=2)
    assert set(calls) == {"save_model", "save_file", "_table", "fsync", "replace"}
    end = whole.student[1].weight
    for call in range(1, len(calls) + 1):
        folder = tmp_path / str(call)
        with full_at(call)[0], pytest.raises(WriteError, match="cannot be written: No space left on device"):
            train(folder, epochs=2)
        assert not list(folder.glob("*.part"))
        reported = (
            len((folder / "metrics.csv").read_text().splitlines()) - 1 if (folder / "metrics.csv").exists() else 0
        )
        newest = checkpoints.newest(folder)
        assert (0 if newest is None else len(checkpoints.read(newest)["history"])) >= reported
        assert not reported or load_file(folder / "last.safetensors").keys() == {"1.weight", "1.bias"}
        assert torch.equal(train(folder, epochs=2, resume=True).student[1].weight, end), call


def test_only_the_same_run_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume needs output"):
        train(tmp_path, resume=True, overwrite=True)
    train(tmp_path, resume=True)  # where there is nothing, it begins
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"other settings: lr \[0.05\] \(asked: \[0.1\]\), clip_norm None \(asked: 1"):
        train(tmp_path, resume=True, lr=0.1, clip_norm=1.0)
    with pytest.raises(ValueError, match=r"other settings: epochs 3 \(asked: 4\)"):
        train(tmp_path, epochs=4, resume=True)
    train(tmp_path, resume=True)  # and where all is done, nothing happens
    assert contents(tmp_path) == before


class Early(Callback):
    """Ends after an epoch; has a state of its own."""

    def __init__(self) -> None:
        self.epochs = self.steps = 0

    def on_step(self, training: Any, step: int, values: Any) -> None:
        self.steps = step
        assert set(values) == {"loss", "ce", "train_accuracy"}

    def on_epoch(self, training: Any, row: dict[str, float]) -> None:
        self.epochs += 1
        row["mine"] = self.epochs
        training.stop = self.epochs == 2

    def state_dict(self) -> dict[str, int]:
        return {"epochs": self.epochs, "steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)


def test_callbacks_see_steps_and_epochs_and_are_resumed(tmp_path: Path) -> None:
    first, second = Early(), Early()
    train(tmp_path, epochs=5, callbacks=[first], save_every=4)
    assert (first.epochs, first.steps) == (2, 6)
    train(tmp_path, epochs=5, callbacks=[second], save_every=4, resume=True)
    assert second.state_dict() == first.state_dict()
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0].endswith(",mine")
