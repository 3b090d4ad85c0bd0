"""Two processes make the student of one process on the whole batches: SP compares the rows of both, for example."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from sequence_tools import by_whole_logits, gpt2
from torch.utils.data import DataLoader

from kdkernels.training import fit

pytestmark = pytest.mark.slow

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
    run(name, tmp_path)
    check(name, tmp_path, expected.student.state_dict(), 1e-5)


def test_a_step_of_both_processes_is_divided_by_the_tokens_of_both(tmp_path: Path) -> None:
    student = gpt2()
    by_whole_logits(student, ce_weight=0.5)
    run("language", tmp_path)
    expected = student.state_dict()
    for name in [name for name in expected if name.endswith("c_attn.bias")]:
        del expected[name]  # a third are keys', which change nothing: Adam makes steps of their gradients' rounding
    check("language", tmp_path, expected, 1e-3)


def run(name: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(two_processes.__file__)
    done = subprocess.run(
        [*command, str(script), name, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def check(name: str, folder: Path, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for rank in (0, 1):
        student = torch.load(folder / f"{name}-{rank}.pt")
        for key, value in expected.items():
            message = f"{key} of rank {rank}"
            torch.testing.assert_close(student[key], value.cpu(), rtol=tolerance, atol=tolerance / 10, msg=message)
