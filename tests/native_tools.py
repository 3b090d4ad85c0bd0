"""What the tests of the native build share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from forks import Fork

from kdkernels.ops import native_build

ROOT = Path(__file__).parents[1]
# what each process of a test does: a loss in auto mode, and what became of the native backend
PROBE = """
import logging, torch
logging.basicConfig(level=logging.INFO)
import kdkernels
from kdkernels.ops import native
x = torch.arange(12.0).view(3, 4).requires_grad_()
loss = kdkernels.sp_loss(x, x.detach().square())
loss.backward()
assert loss.isfinite() and x.grad.isfinite().all()
print("REASON", native.why_not())
"""


def compiler() -> str:
    try:
        return native_build.find_compiler()
    except native_build.BuildError as error:
        pytest.skip(str(error))


def start(cache: Path, code: str = PROBE, **environment: str) -> Fork:
    env = {k: v for k, v in os.environ.items() if not k.startswith("KDKERNELS_")}
    if "PATH" in environment:  # it says what compilers there are
        env.pop("CXX", None)
    env |= {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return Fork(code, env)


def outcome(process: Fork) -> tuple[str, str]:
    """The reason why there are no native kernels ("None" with them), and all that was printed."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output.split("REASON ")[1].strip(), output


def copy_of_the_checkout(folder: Path) -> Path:
    """The tracked files in ``folder``: whoever builds there leaves the checkout as it was."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    everything = (str(path.relative_to(ROOT)) for path in ROOT.rglob("*"))
    for name in tracked.stdout.split("\n") if tracked.returncode == 0 else everything:
        if name and (ROOT / name).is_file() and ".venv" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder
