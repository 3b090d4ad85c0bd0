"""In two processes SP compares the rows of both: the student is that of one process on the whole batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from torch.utils.data import DataLoader

from kdkernels.training import fit

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["hf", "lightning"])
def test_rows_are_compared_over_both_processes(name: str, tmp_path: Path) -> None:
    expected = two_processes.make()
    fit(
        expected,
        DataLoader(two_processes.dataset(), two_processes.BATCH),
        epochs=1,
        lr=two_processes.LR,
        progress=False,
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(two_processes.__file__)
    done = subprocess.run(
        [*run, str(script), name, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        student = torch.load(tmp_path / f"{name}-{rank}.pt")
        for key, value in expected.student.state_dict().items():
            torch.testing.assert_close(student[key], value.cpu(), rtol=1e-5, atol=1e-6, msg=f"{key} of rank {rank}")
