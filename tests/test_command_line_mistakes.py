"""Every mistake on the command line is one line, with what is valid, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_model

from kdkernels import __version__, cli
from kdkernels.training.methods import METHODS
from kdkernels.training.models import small_student

COMMANDS = "train, compare, eval, export, plan, teacher, demo, doctor"
METHOD_NAMES = ", ".join(METHODS)


def message(capsys: pytest.CaptureFixture[str], line: list[str]) -> str:
    try:
        code = cli.main(line)
    except SystemExit as error:
        code = error.code
    assert code == 2
    (text,) = capsys.readouterr().err.splitlines()
    return text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", f"kdkernels: say what to do: {COMMANDS}, or --help"),
        ("trian", "invalid choice: 'trian' (choose from"),
        ("train --epoch 3", "kdkernels train: there is no '--epoch'; did you mean --epochs?"),
        ("train --weigth=3", "there is no '--weigth=3'; did you mean --weight?"),
        ("plan --qqq", "options are --help, --losses, --batch-size, --ranks"),
        ("train kd", "there is no 'kd'; options are --help, --config, --method"),
        ("train --epochs 0", "argument --epochs: must be a whole number, 1 or more, got '0'"),
        ("train --epochs", "argument --epochs: expected one argument"),
        ("train --lr x", "argument --lr: must be a positive number, got 'x'"),
        ("train --seed -1", "argument --seed: must be a whole number from 0 to 2**32 - 1, got '-1'"),
        ("train --mixed-precision fp8", "invalid choice: 'fp8' (choose from"),
        ("train --workers -1", "argument --workers: must be a whole number, 1 or more, got '-1'"),
        ("train --method kdd", f"a method is one of {METHOD_NAMES}, got 'kdd' in 'kdd'; did you mean"),
        ("train --method kd@0.1", "--method kd@0.1: the learning rate is --lr here"),
        (
            "train --method sp:wieght=3",
            "sp has no option 'wieght'; it has weight, warmup, layers, teacher_layers, adapt",
        ),
        ("train --method sp:weight", "sp:weight: options are OPTION=VALUE, got 'weight'"),
        ("train --method sp:weight=much", "sp:weight=much: SP: weight must be a number, got str"),
        ("train --method sp:weight=-1", "weight must be zero or positive and finite, got -1"),
        ("train --method kd:divergence=far", "'forward'"),
        ("train --method alone:alpha=-1", "alpha must be positive and finite, got -1"),
        ("train --method corsd:weight=1", "corsd has no option 'weight'; it has triplet_weight"),
        ("train --method stkd+mlkd", "only one method of a mixture may change the batch, got STKD and MLKD"),
        ("train --data mnist", "data must be 'digits', 'glyphs', hf:NAME, hf:FOLDER or an existing"),
        ("train --data digits --image-size 9", "an image size, a label column and streaming belong to hf: data sets"),
        ("train --augment flip", "an augmentation is one of none, crop, crop-flip, resized-crop-flip, got 'flip'"),
        ("train --model resnet9", "there is no model 'resnet9': did you mean resnet8"),
        ("train --model nowhere:net", "nowhere:net: No module named 'nowhere'"),
        ("train --model torch:tensor", "torch:tensor makes no network"),
        ("train --teacher nowhere.pth", "nowhere.pth does not exist"),
        ("train --teacher pretrained", "no published weights of 'small_teacher'"),
        ("train --resume --overwrite", "give one of them"),
        ("train --method at:layers=stages.9", "stages.9"),
        ("train --method at:adapt=glue", "'map', 'pool'"),
        ("train --config nowhere.yaml", "--config nowhere.yaml: No such file or directory"),
        ("compare --methods kd,spp", f"a method is one of {METHOD_NAMES}, got 'spp'"),
        ("compare --methods kd@fast", "after @ comes a learning rate, a positive number, got 'fast'"),
        ("compare --methods kd+kd", "kd+kd names a method twice"),
        ("compare --seeds none", "argument --seeds: must be how many, or which ones, as 0,3,7 or 5, got 'none'"),
        ("compare --seeds 0", "argument --seeds: must be how many"),
        ("compare --lrs 0.1,,", "argument --lrs: must be a positive number, got ''"),
        ("eval", "the following arguments are required: --weights"),
        ("eval --weights nowhere.pth", "is in no run's folder, which would say more: give --model and --data"),
        ("eval --weights nowhere.pth --model resnet8 --data digits", "nowhere.pth does not exist"),
        ("eval --weights x --on validation", "invalid choice: 'validation' (choose from"),
        ("export --weights x --output x.h5", "--output must end in .pt2 or .onnx, got 'x.h5'"),
        ("export --weights x --output x.pt2 --shape 1x8x8", "--shape and --classes go together"),
        ("plan --losses sp,kd", "--losses are of sp, rkd, pkt, cc, irg, mlkd, got 'kd'"),
        ("plan --student 7xy", "argument --student: must be sizes such as 512 or 512x7x7, got '7xy'"),
        ("demo --seeds many", "argument --seeds: must be a whole number"),
        ("doctor --all", "there is no '--all'; options are --help"),
    ],
)
def test_a_mistake_is_one_line(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in message(capsys, line.split())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"kdkernels {__version__}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch: 3", "there is no 'epoch'; did you mean --epochs?"),
        ("epochs: none", "argument --epochs: must be a whole number, 1 or more, got 'none'"),
        ("overwrite: 3", "overwrite must be true or false, got 3"),
        ("lr: {a: 1}", "lr must be one value or a list of them, got {'a': 1}"),
        ("- kd", "must hold OPTION: VALUE lines, got a list"),
        ("a: [", "while parsing"),
    ],
)
def test_mistakes_in_a_file_of_options(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    assert said in message(capsys, ["train", "--config", str(path)])


def test_a_file_of_options_is_as_good_as_flags_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("lr: 0.3\nepochs: 7\nweight: [sp=3, kd=0.5]\nmethod: kd+sp\nmixed_precision: no\nresume: true\n")
    top = cli.parser()
    line = cli.with_config(top, ["train", "--config", str(path), "--epochs", "9", "--weight", "sp=4"])
    args = top.parse_args(line)
    assert (args.lr, args.epochs, args.method, args.mixed_precision) == (0.3, 9, "kd+sp", "no")
    assert (args.resume, args.overwrite, args.weight) == (True, False, ["sp=3", "kd=0.5", "sp=4"])
    path.write_text("methods: [kd, 'sp:weight=3']\nseeds: [4]\nlrs: [0.1, 0.2]\nteacher: null\n")
    args = top.parse_args(cli.with_config(top, ["compare", f"--config={path}"]))
    assert (args.methods, args.seeds, args.lrs, args.teacher) == (["kd", "sp:weight=3"], [4], [0.1, 0.2], None)


def test_a_run_says_what_it_was_and_can_be_repeated_from_that(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    line = ["train", "--method", "alone", "--per-class", "5", "--epochs", "2", "--lr", "0.2", "--seed", "3"]
    assert cli.main([*line, "--output", str(first)]) == 0
    files = {"config.yaml", "versions.json", "metrics.csv", "curves.png", "best.safetensors", "last.safetensors"}
    assert files <= {path.name for path in first.iterdir()}
    options = yaml.safe_load((first / "config.yaml").read_text())
    assert (options["seed"], options["lr"], options["model"]) == (3, 0.2, "small_student")
    assert cli.main(["train", "--config", str(first / "config.yaml"), "--output", str(second)]) == 0
    assert (first / "last.safetensors").read_bytes() == (second / "last.safetensors").read_bytes()


def test_eval_knows_the_run_of_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "--method", "alone", "--per-class", "5", "--epochs", "2", "--output", str(tmp_path)]
    assert cli.main(line) == 0
    last = (tmp_path / "metrics.csv").read_text().splitlines()
    row = dict(zip(last[0].split(","), last[-1].split(","), strict=True))
    capsys.readouterr()
    assert cli.main(["eval", "--weights", str(tmp_path / "last.safetensors")]) == 0
    out = capsys.readouterr().out
    top1, top5 = (float(row[f"test_{name}"]) for name in ("accuracy", "top5"))
    assert out == (
        f"small_student on digits (test): {top1:.2f} %, top-5 {top5:.2f} %, loss {float(row['test_loss']):.4f}\n"
    )


def test_eval_counts_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of weights in no run's folder, on data of one's own: against the network's answers counted by hand."""
    x, y = np.random.default_rng(0).random((40, 8, 8)).astype(np.float32), np.arange(40) % 10
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    network = small_student(1, 10).eval()
    save_model(network, str(tmp_path / "net.safetensors"))
    options = ["--model", "small_student", "--data", str(tmp_path / "set.npz"), "--on", "train", "--json"]
    assert cli.main(["eval", "--weights", str(tmp_path / "net.safetensors"), *options]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    images = torch.from_numpy((x - x.mean()) / x.std())[:, None]
    with torch.no_grad():
        ranks = network(images).argsort(1, descending=True).tolist()
    assert found["accuracy"] == pytest.approx(100 * sum(r[0] == label for r, label in zip(ranks, y, strict=True)) / 40)
    assert found["top5"] == pytest.approx(100 * sum(label in r[:5] for r, label in zip(ranks, y, strict=True)) / 40)
