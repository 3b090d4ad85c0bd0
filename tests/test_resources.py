"""Losses leave nothing behind, and take the memory that their pages of the documentation say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checking import DEVICE
from resources import PEAKS, STEPS

ROOT = Path(__file__).parents[1]
COUNT = int(os.environ.get("KDKERNELS_STEPS", "0"))  # make harden: 10,000 of every loss
FEW = ["kd", "sp", "amd", "rkd", "linear_kd"]
GROWTH = 1 << 19  # bytes: 52 a step of 10,000
LINES = re.compile(r"^\*\*Memory\*\* of a step.*?(?:\n\n|\Z)", re.M | re.S)

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu" or not sys.platform.startswith("linux"), reason="reads /proc/self"),
    pytest.mark.slow,
]


def measured(*arguments: str) -> dict[str, list[int]]:
    """What resources.py prints, by loss."""
    code = str(ROOT / "tests" / "resources.py")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    said = subprocess.run([sys.executable, code, *arguments], env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    lines = [line.split("\t") for line in said.stdout.splitlines()]
    return {name: [int(x) for x in numbers] for name, *numbers in lines}


def documented() -> dict[str, str]:
    """The formulas of the pages: ``kd_loss``: ``N*C + 8*N``."""
    found: dict[str, str] = {}
    for page in sorted((ROOT / "docs").glob("*.md")):
        for line in LINES.findall(page.read_text()):
            found |= dict(re.findall(r"`(\w+)`:\s`([^`]+)`", line))
    return found


def test_steps_leave_nothing_behind() -> None:
    losses = list(STEPS) if COUNT else FEW
    for name, (grown, handles, threads) in measured("steps", str(COUNT or 400), *losses).items():
        assert grown <= GROWTH, f"{name}: {grown} bytes"
        assert (handles, threads) == (0, 0), name


def test_every_loss_has_a_formula_of_its_memory() -> None:
    assert set(documented()) == set(PEAKS)


@pytest.mark.parametrize("name", list(PEAKS) if COUNT else ["kd_loss"])
def test_the_peak_of_a_step_is_as_documented(name: str) -> None:
    formula = eval(documented()[name], {}, PEAKS[name][1])  # arithmetic of our own pages
    (peak,) = measured("peaks", name)[name]
    assert 0.8 * formula <= peak <= 1.05 * formula + (1 << 18), f"{peak} is not {formula}"
