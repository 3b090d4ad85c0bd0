"""Two processes make the student of one process on the whole batches: SP compares the rows of both, for example."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import two_processes
from forks import start_ranks
from sequence_tools import by_whole_logits, gpt2
from torch.utils.data import DataLoader

from kdkernels.training import fit

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pair of processes for all trainers: what they import takes longer than what they do."""
    folder = tmp_path_factory.mktemp("students")
    start_ranks(two_processes.work, (str(folder),))
    return folder


@pytest.mark.parametrize("name", ["hf", "lightning"])
def test_rows_are_compared_over_both_processes(name: str, students: Path) -> None:
    expected = two_processes.make()
    fit(
        expected,
        DataLoader(two_processes.dataset(), two_processes.BATCH),
        epochs=1,
        lr=two_processes.LR,
        progress=False,
    )
    check(name, students, expected.student.state_dict(), 1e-5)


def test_a_step_of_both_processes_is_divided_by_the_tokens_of_both(students: Path) -> None:
    student = gpt2()
    by_whole_logits(student, ce_weight=0.5)
    expected = student.state_dict()
    for name in [name for name in expected if name.endswith("c_attn.bias")]:
        del expected[name]  # a third are keys', which change nothing: Adam makes steps of their gradients' rounding
    check("language", students, expected, 1e-3)


def check(name: str, folder: Path, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for rank in (0, 1):
        student = torch.load(folder / f"{name}-{rank}.pt")
        for key, value in expected.items():
            message = f"{key} of rank {rank}"
            torch.testing.assert_close(student[key], value.cpu(), rtol=tolerance, atol=tolerance / 10, msg=message)
