"""``kdkernels compare``: which runs there are, what the table says of them, and what is made again."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from kdkernels import cli
from kdkernels.training import METHODS, Callback, compare, output_cache
from kdkernels.training.methods.spelling import parse
from kdkernels.training.statistics import Difference, deviation, mean_and_deviation, paired


def saved(path: Path) -> str:
    """Images that are no squares, of three classes."""
    x, y = np.random.default_rng(0).random((48, 5, 6)), np.arange(48) % 3
    x[np.arange(48), y] += 0.3
    np.savez(path, x_train=x, y_train=y, x_test=x[:30] + 0.1, y_test=y[:30])
    return str(path)


def command(folder: Path, *options: str) -> list[str]:
    data = folder / "set.npz"
    common = ["--epochs", "3", "--teacher-epochs", "2", "--batch-size", "12", "--seeds", "2"]
    return ["compare", "--data", saved(data), "--output", str(folder / "out"), *common, *options]


def entries(*options: str) -> list[compare.Entry]:
    return compare.entries_of(cli.parser().parse_args(["compare", *options]))


def test_spellings() -> None:
    spelling = parse("kd:temperature=2+sp:weight=1e2@0.4")
    assert spelling.parts == [("kd", {"temperature": 2}), ("sp", {"weight": 100.0})]
    assert spelling.lr == 0.4
    kd, sp = spelling.method().methods
    assert (kd.kd.temperature, sp.weight) == (2, 100)
    assert parse("at:layers=stages.0/stages.2").pairs == {"layers": ["stages.0", "stages.2"]}
    assert parse("kd:standardize=true:divergence=reverse").parts[0][1] == {"standardize": True, "divergence": "reverse"}
    assert parse("corsd:margin=2").method().options == {"margin": 2}


def test_which_rows() -> None:
    assert [e.folder for e in entries()] == [f"{name}@0.1" for name in METHODS]
    assert [e.epochs for e in entries("--epochs", "10", "--methods", "kd,corsd")] == [10, 10, 3]
    rows = entries("--methods", "kd,kd+sp:weight=300@0.2,kd,alone,alone@0.5", "--lr", "0.4", "--lrs", "0.4,0.8")
    assert [(e.name, e.lr) for e in rows] == [
        ("alone", 0.4),
        ("alone", 0.8),
        ("kd", 0.4),
        ("kd+sp:weight=300", 0.2),
        ("alone", 0.5),
    ]
    assert rows[3].folder == "kd+sp,weight=300@0.2"


def test_statistics() -> None:
    difference = paired({0: 3.0, 1: 5.0, 2: 10.0}, {0: 2.0, 1: 2.0, 3: 9.0})
    assert difference == Difference(2.0, 1.0)
    assert not difference.clear
    assert str(difference) == "+2.0 (1.0)"
    assert Difference(2.0, 0.9).clear
    assert not Difference(2.0, deviation([1.0])).clear  # of one seed nothing is known
    assert paired({0: 3.0}, {1: 3.0}) is None
    assert mean_and_deviation([1.0, 3.0]) == "2.0 ± 1.4"
    assert mean_and_deviation([1.0]) == "1.0"


def test_a_comparison_from_the_first_run_to_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = command(tmp_path, "--methods", "mlkd,kd", "--lrs", "0.1,0.2")
    assert cli.main(line) == 0
    out, folder = capsys.readouterr().out, tmp_path / "out"
    results = json.loads((folder / "results.json").read_text())
    rows = {(row["method"], row["lr"]): row for row in results["rows"]}
    assert list(rows) == [("alone", 0.1), ("alone", 0.2), ("mlkd", 0.1), ("kd", 0.1)]

    # a method that cannot be is in the table and stops nothing
    failure = "failed with seed 0, 1: rotate_views: a quarter turn needs square images, got (12, 1, 5, 6)"
    assert rows["mlkd", 0.1]["failed"] == failure
    assert failure in out
    assert "Traceback" in (folder / "runs/mlkd@0.1/seed-0/error.txt").read_text()

    # the numbers are those of the runs
    for (method, lr), row in rows.items():
        for seed in range(row["seeds"]):
            with (folder / f"runs/{method}@{lr}/seed-{seed}/metrics.csv").open() as file:
                history = list(csv.DictReader(file))
            assert [r["epoch"] for r in history] == ["1", "2", "3"]
            assert float(history[-1]["test_accuracy"]) == row[f"seed_{seed}"]
    best = max((rows["alone", lr] for lr in (0.1, 0.2)), key=lambda row: row["mean"])
    kd = rows["kd", 0.1]
    differences = [kd[f"seed_{seed}"] - best[f"seed_{seed}"] for seed in range(2)]
    assert kd["mean"] == pytest.approx((kd["seed_0"] + kd["seed_1"]) / 2)
    assert kd["deviation"] == pytest.approx(statistics.stdev([kd["seed_0"], kd["seed_1"]]))
    assert kd["against_alone"] == pytest.approx(sum(differences) / 2)
    assert kd["against_alone_error"] == pytest.approx(abs(differences[0] - differences[1]) / 2)
    assert "against_kd" not in kd
    assert "against_kd" in best
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert float(table[3]["mean"]) == kd["mean"]
    text = (folder / "results.md").read_text()
    assert f"{kd['mean']:.1f} ± {kd['deviation']:.1f}" in text
    assert f"{results['teacher']:.1f} %" in text
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert results["settings"]["model"] == "small_student"
    assert results["versions"]["kdkernels"] == "0.1.0"

    # 48 images in 4 batches; the teacher's outputs, the same for all seeds, were kept
    assert [row["images"] for row in results["rows"]] == [144, 144, 4 * 144, 144]
    (outputs,) = (folder / "teacher-outputs").iterdir()
    assert (outputs / "shard-00000.safetensors").is_file()

    # again: only what failed, and what is new
    with mock.patch.object(compare, "fit", side_effect=ArithmeticError("it trains")) as fit:
        assert cli.main([*line[:-4], "--methods", "kd,at", "--lrs", "0.1,0.2"]) == 0
    assert fit.call_count == 2
    again = json.loads((folder / "results.json").read_text())["rows"]
    assert again[2] == kd
    assert again[3]["failed"] == "failed with seed 0, 1: ArithmeticError: it trains"

    # another comparison does not fall into this one's folder
    capsys.readouterr()
    assert cli.main([*line, "--epochs", "4"]) == 2
    message = f"kdkernels compare: {folder} holds a comparison with other settings: epochs 3 (asked: 4); --overwrite"
    assert capsys.readouterr().err.startswith(message)
    assert cli.main(["train", "--data", "digits", "--output", str(folder), "--method", "nothing"]) == 2


def test_an_interrupted_run_goes_on_and_is_what_train_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = command(tmp_path, "--methods", "kd", "--seeds", "1")
    stopped = []

    class Interrupt(Callback):
        def __init__(self, *_: object) -> None:
            pass

        def on_epoch(self, training: object, row: dict[str, float]) -> None:
            if training.name == "kd" and row["epoch"] == 3:
                stopped.append(1)
                raise KeyboardInterrupt

    with mock.patch.object(compare, "Bar", Interrupt):
        assert cli.main(line) == 130
    assert stopped
    assert "the same command goes on from there" in capsys.readouterr().err
    run = tmp_path / "out/runs/kd@0.1/seed-0"
    assert len(list(run.glob("checkpoint-*"))) == 2
    assert cli.main(line) == 0
    assert "1 runs are finished already, 1 are to be made" in capsys.readouterr().out
    assert not list(run.glob("checkpoint-*"))

    teacher = str(tmp_path / "out/teacher/last.safetensors")
    options = ["--teacher", teacher, "--method", "kd", "--output", str(tmp_path / "train")]
    whole = ["train", *line[1:3], *options, "--epochs", "3", "--batch-size", "12"]
    assert cli.main(whole) == 0

    # a teacher that is given is tested
    results = json.loads((tmp_path / "out/results.json").read_text())
    given = ["--teacher", teacher, "--methods", "kd", "--seeds", "0,", "--output", str(tmp_path / "given")]
    assert cli.main([*line, *given, "--epochs", "1"]) == 0
    again = json.loads((tmp_path / "given/results.json").read_text())
    assert again["teacher"] == pytest.approx(results["teacher"])
    assert (tmp_path / "train/last.safetensors").read_bytes() == (run / "last.safetensors").read_bytes()


def test_numbers_are_those_without_the_teachers_outputs(tmp_path: Path) -> None:
    line = command(
        tmp_path, "--methods", "kd,amd,mlkd:views=1+sp,corsd", "--seeds", "1", "--epochs", "2", "--per-class", "12"
    )
    teacher = ["--teacher", str(tmp_path / "with/teacher/last.safetensors")]
    rows = {}
    for choice, more in (("with", []), ("without", ["--teacher-cache", "no", *teacher])):
        assert cli.main([*line, "--output", str(tmp_path / choice), *more]) == 0
        found = json.loads((tmp_path / choice / "results.json").read_text())["rows"]
        rows[choice] = [{k: v for k, v in row.items() if k != "seconds"} for row in found]
    assert rows["with"] == rows["without"]
    assert len(list((tmp_path / "with/teacher-outputs").glob("*-0"))) == 3  # logits, all stages, the last one
    assert not (tmp_path / "without/teacher-outputs").exists()
    for run in (tmp_path / "with/runs").glob("*/seed-0/last.safetensors"):
        assert run.read_bytes() == (tmp_path / "without" / run.relative_to(tmp_path / "with")).read_bytes()


def test_a_disk_without_room_is_no_reason_to_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mock.patch.object(output_cache.shutil, "disk_usage", return_value=mock.Mock(free=100)):
        assert cli.main(command(tmp_path, "--methods", "kd", "--seeds", "1", "--epochs", "1")) == 0
    assert "are free; the teacher runs in every epoch instead" in caplog.text
    assert "kd" in (tmp_path / "out/results.md").read_text()


def test_nothing_but_failures_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(compare, "fit", side_effect=ValueError("no\nway")):
        assert cli.main(command(tmp_path, "--methods", "alone")) == 1
    assert "\n- alone at 0.1 failed with seed 0, 1: no\n" in capsys.readouterr().out


OWN = """
from torch import nn


def net(num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


def test_own_networks_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--methods", "kd", "--model", "own:net", "--teacher-model", "own:net", "--seeds", "3,"]
    assert cli.main(command(tmp_path, *options)) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [(row["method"], row["seeds"]) for row in rows] == [("alone", 1), ("kd", 1)]
    assert rows[1]["against_alone"] == rows[1]["seed_3"] - rows[0]["seed_3"]
    assert "against_alone_error" not in rows[1]  # one seed says nothing of the others
    assert cli.main(["eval", "--weights", str(tmp_path / "out/teacher/last.safetensors")]) == 0
