"""The wheel: made without torch and without a compiler, complete, and usable from anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from native_tools import copy_of_the_checkout

import kdkernels

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("package")]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in an empty environment, with nothing on PATH but that environment."""
    folder = tmp_path_factory.mktemp("wheel")
    venv.create(folder / "venv")
    source = copy_of_the_checkout(folder / "source")
    environment = os.environ | {"PATH": str(folder / "venv" / "bin")}
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "venv"), "wheel"]
    subprocess.run([*pip, "-q", "--no-deps", "-w", str(folder), str(source)], check=True, env=environment)
    (built,) = folder.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl"), "something was compiled"
    return built


def test_the_wheel_is_complete(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "kdkernels").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert "kdkernels/py.typed" in names
    for path in (ROOT / "csrc").iterdir():  # for builds at first use
        assert f"kdkernels/csrc/{path.name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    names_required = sorted(re.split(r"[>; ]", line.split()[1])[0] for line in required)
    assert names_required == ["filelock", "ninja", "numpy", "torch", "triton"]


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True
    )
    code = (
        "import kdkernels.sp_loss; from kdkernels import sp_loss, SPLoss, kd_loss, stkd_loss, amd_loss; import torch;"
        f"assert kdkernels.__file__.startswith({str(target)!r}), kdkernels.__file__;"
        "x = torch.randn(4, 3, 5, 5, requires_grad=True); t = torch.randn(4, 2, 5, 5);"
        "(kdkernels.sp_loss(x, t) + amd_loss(x, t)).backward(); assert x.grad.norm() > 0;"
        "from kdkernels.cli import main; main(['doctor'])"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"kdkernels {kdkernels.__version__}" in done.stdout


def test_the_source_distribution_is_the_checkout(tmp_path: Path) -> None:
    """Its tests are in it, with all that they read."""
    pytest.importorskip("setuptools")
    source = copy_of_the_checkout(tmp_path / "source")
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, env=os.environ | {"KDKERNELS_BUILD_NATIVE": "0"}, check=True)
    (path,) = tmp_path.glob("kdkernels-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert path.name == f"kdkernels-{kdkernels.__version__}.tar.gz"
    assert files - names <= {".gitignore"}
