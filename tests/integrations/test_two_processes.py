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
    start_ranks(two_processes.work, (name, str(tmp_path)))
    check(name, tmp_path, expected.student.state_dict(), 1e-5)


def test_a_step_of_both_processes_is_divided_by_the_tokens_of_both(tmp_path: Path) -> None:
    student = gpt2()
    by_whole_logits(student, ce_weight=0.5)
    start_ranks(two_processes.work, ("language", str(tmp_path)))
    expected = student.state_dict()
    for name in [name for name in expected if name.endswith("c_attn.bias")]:
        del expected[name]  # a third are keys', which change nothing: Adam makes steps of their gradients' rounding
    check("language", tmp_path, expected, 1e-3)


def check(name: str, folder: Path, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for rank in (0, 1):
        student = torch.load(folder / f"{name}-{rank}.pt")
        for key, value in expected.items():
            message = f"{key} of rank {rank}"
            torch.testing.assert_close(student[key], value.cpu(), rtol=tolerance, atol=tolerance / 10, msg=message)
