"""Data, ``kdkernels train`` and the demo."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from time import sleep
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_model

import kdkernels
from kdkernels import cli
from kdkernels.training import (
    data,
    make_method,
)
from kdkernels.training.demo import loss_of, loss_times, run_demo
from kdkernels.training.models import small_student, small_teacher
from kdkernels.training.run import spelt


def test_digits_are_standardised_and_always_the_same() -> None:
    split = data.digits()
    x = split.train.tensors[0]
    assert x.shape == (1000, 1, 8, 8)
    assert len(split.test) == 797
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(x, data.digits().train.tensors[0])
    subset = data.labelled_subset(split.train, 7, seed=1)
    assert torch.bincount(subset.tensors[1]).tolist() == [7] * 10
    with pytest.raises(ValueError, match="1000 were asked for"):
        data.labelled_subset(split.train, 1000, seed=0)


def saved(path: Path, **arrays: object) -> str:
    """An .npz file of nine small images and labels, some of its arrays others."""
    x, y = np.random.default_rng(0).random((9, 5, 6)), np.arange(9) % 3
    np.savez(path, **({"x_train": x, "y_train": y, "x_test": x[:3], "y_test": y[:3]} | arrays))
    return str(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_train": np.eye(9)}, r"y_train must hold one label per image, got shape \(9, 9\)"),
        ({"y_train": np.arange(9) + 0.5}, "y_train must hold whole numbers"),
        ({"y_train": np.arange(9) * 1j}, "y_train must hold whole numbers"),
        ({"y_train": np.full(9, np.nan)}, "y_train must hold whole numbers"),
        ({"y_train": np.array(list("abcabcabc"))}, "y_train must hold whole numbers"),
        ({"y_test": np.array([-1, 0, 1])}, "y_test must hold whole numbers"),
        ({"x_train": np.full((9, 5, 6), np.nan)}, "x_train has NaN"),
        ({"x_test": np.full((3, 5, 6), np.inf)}, "x_test has NaN or infinite"),
        ({"x_train": np.ones((9, 5, 6))}, "x_train has 9 images, all pixels the same"),
        ({"x_train": np.ones((0, 5, 6)), "y_train": np.arange(0)}, "x_train has 0 images"),
        ({"x_test": np.ones((3, 3, 5, 6))}, "have 1 channels, those of x_test 3"),
        ({"x_train": np.ones((9, 3, 8, 3))}, r"x_train is \(9, 3, 8, 3\): .* the second or the last size"),
        ({"x_train": np.ones((9, 2, 5, 4))}, r"x_train is \(9, 2, 5, 4\): .* the second or the last size"),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(saved(tmp_path / "bad.npz", **arrays))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((9, 1, 4, 4), (1, 4, 4)),
        ((9, 1, 9, 2), (1, 9, 2)),
        ((9, 4, 4, 3), (3, 4, 4)),
        ((9, 4, 4, 1), (1, 4, 4)),
        ((9, 8, 8, 3), (3, 8, 8)),
        ((9, 3, 4, 4), (3, 4, 4)),
    ],
)
def test_channels_are_found_in_small_images(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).random(shape)
    split = data.load(saved(tmp_path / "set.npz", x_train=x, x_test=x[:3], y_train=np.arange(9.0)[:, None] % 3))
    assert split.train.tensors[0].shape[1:] == expected
    assert split.train.tensors[1].tolist() == [0, 1, 2] * 3


def test_no_batch_of_a_single_triplet() -> None:
    subset = data.labelled_subset(data.digits().train, 1, seed=0)  # 10 images, in batches of 3 triplets
    assert [len(batch[1]) for batch in data.loader(subset, 11, train=True, triplets=True)] == [3, 3, 3]


@pytest.mark.parametrize("shape", [(20, 5, 6), (20, 5, 6, 3), (20, 3, 5, 6)])
def test_npz_files(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x, y = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8), np.arange(20) % 4
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    split = data.load(str(tmp_path / "set.npz"))
    assert split.train.tensors[0].shape == (20, 1 if len(shape) == 3 else 3, 5, 6)
    assert split.classes == 4
    np.savez(tmp_path / "bad.npz", x_train=x)
    with pytest.raises(ValueError, match="lacks"):
        data.load(str(tmp_path / "bad.npz"))
    with pytest.raises(ValueError, match="'imagenet'"):
        data.load("imagenet")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"whole \.npz file, got .*cut"):
        data.load(str(tmp_path / "cut.npz"))


def test_train_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["train", "--epochs", "2", "--teacher-epochs", "1", "--per-class", "10"]
    assert cli.main([*common, "--method", "sp", "--weight", "300", "--output", str(tmp_path / "a")]) == 0
    assert "sp: " in capsys.readouterr().out
    teacher = tmp_path / "a" / "teacher" / "last.safetensors"
    assert (tmp_path / "a" / "metrics.csv").is_file()
    assert cli.main([*common, "--method", "amd", "--teacher", str(teacher), "--output", str(tmp_path / "b")]) == 0
    assert cli.main([*common, "--method", "nothing"]) == 2
    assert "a method is one of alone, kd" in capsys.readouterr().err
    assert cli.main([*common, "--teacher", "missing.safetensors"]) == 2


def test_the_command_line_fails_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(*options: str, method: str = "kd") -> str:
        assert (
            cli.main(["train", "--method", method, "--epochs", "1", "--output", str(tmp_path / "out"), *options]) == 2
        )
        (line,) = capsys.readouterr().err.splitlines()
        return line

    file = tmp_path / "file"
    file.write_text("text")
    assert str(file) in message("--output", str(file), method="alone")
    assert "holds no teacher" in message("--teacher", str(file))
    student = tmp_path / "student.safetensors"
    save_model(small_student(1, 10), str(student))
    assert "holds no teacher" in message("--teacher", str(student))
    assert "weight must be in [0, 1]" in message("--weight", "3")
    teacher = tmp_path / "teacher.safetensors"
    save_model(small_teacher(1, 10), str(teacher))
    unavailable = mock.Mock(side_effect=kdkernels.BackendError("no such kernels"))
    monkeypatch.setattr("kdkernels.training.methods.kd.KDLoss.forward", unavailable)
    assert message("--teacher", str(teacher)) == "kdkernels train: no such kernels"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--epochs", "abc"])
    assert "must be a whole number, 1 or more, got 'abc'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "-1"], "argument --lr: must be a positive number, got '-1'"),
        (["--lr", "nan"], "argument --lr: must be a positive number, got 'nan'"),
        (["--per-class", "9999"], "9999 were asked for"),
        (["--method", "mlkd", "--data", "DATA"], "a quarter turn needs square images, got (9, 1, 5, 6)"),
        (["--seed", "-1"], "argument --seed: must be a whole number from 0 to 2**32 - 1"),
        (["--output", "DATA"], "File exists"),
    ],
)
def test_options_are_checked_before_a_teacher_is_trained(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("run", "setting"):
        monkeypatch.setattr(f"kdkernels.training.{module}.fit", mock.Mock(side_effect=AssertionError("it trains")))
    path = saved(tmp_path / "set.npz")
    try:
        code = cli.main(["train", "--output", str(tmp_path / "out"), *(path if o == "DATA" else o for o in options)])
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_run_and_its_teacher_are_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["train", "--epochs", "1", "--teacher-epochs", "1", "--per-class", "4", "--output", str(tmp_path)]
    assert cli.main(common) == 0
    for path in [tmp_path / "metrics.csv", *tmp_path.glob("*.safetensors")]:
        path.unlink()
    teacher = (tmp_path / "teacher" / "last.safetensors").read_bytes()
    assert cli.main([*common, "--seed", "1"]) == 2
    assert f"{tmp_path / 'teacher'} holds a run already" in capsys.readouterr().err
    assert (tmp_path / "teacher" / "last.safetensors").read_bytes() == teacher
    assert cli.main([*common, "--seed", "1", "--overwrite"]) == 0
    assert (tmp_path / "teacher" / "last.safetensors").read_bytes() != teacher


@pytest.mark.parametrize(
    ("method", "weights", "message"),
    [
        ("kd+sp", ["300"], "--weight 300: say of which of kd, sp it is, as kd=300"),
        ("kd+sp", ["amd=0.2"], "'amd' is not among the methods kd+sp"),
        ("sp", ["much"], "must be a number or method=number, got 'much'"),
        ("stkd", ["3"], "belongs to the methods kd, sp, nkd"),
        ("kd+kd", [], "a method twice"),
        ("kd+", [], "got ''"),
    ],
)
def test_weights_of_several_methods(method: str, weights: list[str], message: str) -> None:
    assert [part.weight for part in spelt("kd+sp", ["sp=300", "kd=0.5"]).method().methods] == [0.5, 300]
    assert spelt("sp", ["300"]).method().weight == spelt("sp:weight=3", ["sp=300"]).method().weight == 300
    with pytest.raises(ValueError, match=re.escape(message)):
        spelt(method, weights)


def test_a_mixture_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tmp_path / "teacher.safetensors"
    save_model(small_teacher(1, 10), str(teacher))
    common = ["train", "--epochs", "1", "--per-class", "4", "--teacher", str(teacher), "--output", str(tmp_path / "a")]
    assert cli.main([*common, "--method", "kd+sp+amd", "--weight", "sp=300"]) == 0
    with (tmp_path / "a" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row.keys() >= {"ce", "kd", "sp", "amd"}


def test_a_teacher_trained_first_does_not_change_the_students_accumulation(tmp_path: Path) -> None:
    options = ["--accumulate", "4", "--mixed-precision", "bf16", "--epochs", "1", "--teacher-epochs", "1"]
    assert cli.main(["train", *options, "--output", str(tmp_path)]) == 0
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["8"]  # 31 batches of 32
    assert AcceleratorState().mixed_precision == "bf16"


def test_demo_tables_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.training import demo

    monkeypatch.setattr(demo, "STUDENT_EPOCHS", 2)
    monkeypatch.setattr(demo, "TEACHER_EPOCHS", 1)
    few = {name: demo.DEMO_METHODS[name] for name in ("alone", "stkd", "corsd")}
    monkeypatch.setattr(demo, "DEMO_METHODS", few)
    results = run_demo(tmp_path, seeds=2)
    assert [result.name for result in results] == list(demo.DEMO_METHODS)
    for result in results:
        assert len(result.accuracies) == 2
        assert all(0 < accuracy < 100 for accuracy in result.accuracies)
        assert result.loss_ms > 0
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "stkd-1" / "last.safetensors").is_file()
    mean, error = demo.gain(results[1], results[0])
    by_hand = [b - a for a, b in zip(results[0].accuracies, results[1].accuracies, strict=True)]
    assert mean == pytest.approx(sum(by_hand) / 2)
    assert error == pytest.approx(abs(by_hand[0] - by_hand[1]) / 2)


def test_times_are_of_the_losses_alone_in_turns() -> None:
    split, calls = data.digits(), []
    kd = loss_of(make_method("kd"), small_teacher(1, 10), small_student(1, 10), split.train, 32)
    losses = {"kd": lambda: (calls.append("kd"), kd()), "slow": lambda: (calls.append("slow"), sleep(0.001))}
    times = loss_times(losses, rounds=5)
    assert calls == ["kd", "slow"] * 5
    assert 0 < times["kd"] < 1000
    assert 1 <= times["slow"] < 1000
