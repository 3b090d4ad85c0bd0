"""Over two processes: what ``kdkernels plan`` computes is what the losses send, and ``compare`` makes one table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from two_ranks import JOBS, launch

from kdkernels import cli
from kdkernels.training.traffic import LOSSES, Collective, Job, sp

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    x, y = np.random.default_rng(0).random((48, 5, 6)), np.arange(48) % 3
    np.savez(path / "set.npz", x_train=x, y_train=y, x_test=x[:30], y_test=y[:30])
    options = ["--methods", "nkd,sp:weight=30,mlkd", "--seeds", "2", "--batch-size", "12"]
    options += ["--epochs", "2", "--teacher-epochs", "1"]
    launch(path, ["compare", "--data", str(path / "set.npz"), "--output", str(path / "out"), *options])
    return path


@pytest.mark.parametrize("name", LOSSES)
def test_the_plan_is_what_is_sent(name: str, folder: Path) -> None:
    for rank in range(2):
        calls = json.loads((folder / f"calls-{rank}.json").read_text())
        for job, counted in zip(JOBS, calls, strict=True):
            assert sorted([c.kind, c.payload] for c in LOSSES[name](job)) == counted[name]


def test_a_comparison_in_two_processes_is_one(folder: Path) -> None:
    rows = {row["method"]: row for row in json.loads((folder / "out/results.json").read_text())["rows"]}
    assert list(rows) == ["alone", "nkd", "sp:weight=30", "mlkd"]
    assert [row["seeds"] for row in rows.values()] == [2, 0, 2, 0]
    assert rows["nkd"]["failed"] == (
        "failed with seed 0, 1: the loss is not finite at step 1 (epoch 1, batch 1 of 2) in another process"
    )
    assert "a quarter turn needs square images" in rows["mlkd"]["failed"]
    assert "| sp:weight=30 | 0.1 | 96          | 2 " in (folder / "out-0.txt").read_text()
    assert not (folder / "out-1.txt").read_text()
    metrics = (folder / "out/runs/sp,weight=30@0.1/seed-1/metrics.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in metrics[1:]] == ["2", "4"]  # of 2 x 12 of 48 images


def test_imagenet_on_64_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--losses", "sp,rkd", "--details"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Computed, not measured: 64 ranks of 32 images, 2048 in a step; student 512 x 7 x 7,")
    maps = 32 * 512 * 49 * 4 * 63 / 64  # bytes of a rank's maps that go to others
    matrices = 2 * 2048**2 * 4 * 2 * 63 / 64  # two fp32 matrices around a ring
    sent = {kind: sum(c.sent(64) for c in sp(Job(32, 64, (512, 7, 7), (512, 7, 7))) if c.kind == kind) for kind in (
        "all_to_all", "all_reduce")}  # fmt: skip
    assert sent["all_to_all"] == 3 * maps
    assert sent["all_reduce"] == matrices + 4 * 2 * 63 / 64
    line = next(line for line in out.splitlines() if line.startswith("sp"))
    assert line.split() == ["sp", "9.48", "MB", "66.1", "MB", "1.51", "kB", "75.5", "MB", "405", "MB"]
    assert Collective("all_gather", "", 10).sent(4) == 30
