"""What the executor is for: seeded faults are caught. A few here; ``make faults`` runs them all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from . import build, faults

pytestmark = pytest.mark.xdist_group("executor")

FEW = ("no barrier behind the loads", "all splits write one product", "the first block sums", "workspace a row short")


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_faults_still_apply_to_the_sources(fault: faults.Fault) -> None:
    assert faults.patched(fault) != build.csrc()


def test_a_few_are_caught() -> None:
    reason = build.why_not()
    if reason:
        pytest.skip(reason)
    path = os.pathsep.join([str(build.ROOT / "tests"), str(build.ROOT)])
    environment = {k: v for k, v in os.environ.items() if k != "KDKERNELS_TEST_CUDA"} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "cuda_on_cpu.faults", *FEW]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("caught")]
    assert len(said) == len(FEW)
    for words in ("shared memory that was never written", "race", "global memory that was never written", "write to"):
        assert any(words in line for line in said), f"nobody said {words!r}:\n{done.stdout}"
