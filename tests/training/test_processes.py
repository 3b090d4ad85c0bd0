"""Two processes with the same batches end with the weights of one, whatever the method."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from torch import Tensor

from kdkernels.training import METHODS

Ends = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[Ends]:
    folder = tmp_path_factory.mktemp("ends")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = str(Path(processes.__file__))
    done = subprocess.run([*command, script, str(folder)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("method", [*METHODS, "sp cached", *(f"{method} sharded" for method in processes.SHARDED)])
def test_two_processes_train_as_one(ends: list[Ends], method: str) -> None:
    expected = processes.trained(method.split()[0])
    for rank in (0, 1):
        actual = ends[rank][method]
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                actual[name], value.cpu(), rtol=1e-5, atol=1e-5, msg=lambda text, key=name: f"{key}: {text}"
            )
