"""How far a training is: lines in a pipe, a bar in a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from kdkernels.training import progress


def told(console: Console, epochs: int) -> None:
    with progress.shown(console, "kd", epochs) as callbacks:
        for epoch in range(1, epochs + 1):
            for callback in callbacks:
                row = {"epoch": epoch, "loss": 1 / epoch, "test_accuracy": 50.0}
                callback.on_epoch(SimpleNamespace(epochs=epochs), row)


@pytest.mark.parametrize(("epochs", "expected"), [(30, 9), (5, 4), (1, 0)])
def test_a_pipe_gets_a_few_lines_without_control_codes(
    epochs: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0)
    file = io.StringIO()
    told(Console(file=file, width=20), epochs)
    lines = file.getvalue().splitlines()
    assert len(lines) == expected
    assert not any(ord(c) < 32 for line in lines for c in line)
    if epochs == 30:
        assert lines[0] == "kd: epoch 3 of 30, loss 0.3333, test 50.0 %"


def test_lines_come_seconds_apart() -> None:
    file = io.StringIO()
    told(Console(file=file), 30)
    assert not file.getvalue()


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    file = io.StringIO()
    told(Console(file=file, force_terminal=True, width=60), 3)
    assert "3/3" in file.getvalue()
    assert file.getvalue().rstrip().endswith("\x1b[2K")
