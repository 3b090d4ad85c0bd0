"""``kdkernels export``: files that give what the network gives."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from kdkernels import cli
from kdkernels.training import export
from kdkernels.training.models import small_student

SHAPE = ["--model", "small_student", "--shape", "1x8x8", "--classes", "10"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    network = small_student(1, 10)
    network(torch.randn(64, 1, 8, 8))  # statistics that are not 0 and 1
    save_model(network, str(path))
    return path


def test_a_program_gives_the_networks_logits(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = weights.with_name("net.pt2")
    assert cli.main(["export", "--weights", str(weights), "--output", str(path), *SHAPE]) == 0
    out = capsys.readouterr().out
    assert "small_student, images (N, 1, 8, 8) to (N, 10)" in out
    assert float(re.search(r"but for (\S+) of", out)[1]) < 1e-5
    network = export.load(weights, "small_student", 1, 10)
    images = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(images), network(images))


def test_outputs_that_differ_leave_no_file(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(model: nn.Module, images: torch.Tensor, path: Path) -> object:
        path.write_text("wrong")
        return lambda images: model(images) * 1.01

    path = weights.with_name("other.pt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(export.FORMATS, ".pt2", wrong)
        assert cli.main(["export", "--weights", str(weights), "--output", str(path), *SHAPE]) == 2
    assert "were other than the network's, by" in capsys.readouterr().err
    assert not path.exists()


def test_onnx_where_it_is_installed(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = weights.with_name("net.onnx")
    code = cli.main(["export", "--weights", str(weights), "--output", str(path), *SHAPE])
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    out, err = capsys.readouterr()
    if missing:
        assert code == 2
        assert err == (
            f"kdkernels export: an .onnx file needs {', '.join(missing)}: pip install onnx onnxscript onnxruntime\n"
        )
    else:
        assert code == 0
        assert float(re.search(r"but for (\S+) of", out)[1]) < 1e-4
