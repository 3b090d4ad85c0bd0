"""Two processes with the same batches end with the weights of one, whatever the method."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import processes
import pytest
import torch
from accelerate.utils import DistributedType
from forks import start_ranks
from torch import Tensor
from training_tools import network

from kdkernels.training import METHODS, Distillation, sharding

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

Ends = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[Ends]:
    folder = tmp_path_factory.mktemp("ends")
    start_ranks(processes.work, (folder,))
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


def accelerator(**changes: Any) -> Any:
    plugin = SimpleNamespace(cpu_ram_efficient_loading=changes.pop("meta", False))
    own = {"distributed_type": DistributedType.FSDP, "is_fsdp2": True, "gradient_accumulation_steps": 1}
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), num_processes=2, **(own | changes))


@pytest.mark.parametrize(
    ("changes", "saves", "message"),
    [
        ({"is_fsdp2": False}, False, r"FSDP2 alone: .*\(fsdp_version=2\)"),
        ({"meta": True}, False, "would take the teacher's weights away: .*cpu_ram_efficient_loading=False"),
        ({}, True, "leave out output, and save with accelerator.save_state"),
        ({"gradient_accumulation_steps": 2}, False, "SP takes all micro-batches of a step .*: accumulate=1 and more"),
    ],
)
def test_what_sharded_weights_do_not_allow(changes: dict[str, Any], saves: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharding.check(accelerator(**changes), Distillation(network(), network(), "sp"), saves)
    sharding.check(accelerator(gradient_accumulation_steps=2), Distillation(network(), network(), "kd"), False)


def test_weights_that_are_not_sharded_are_told(caplog: pytest.LogCaptureFixture) -> None:
    module = Distillation(network(), network(), "kd")
    here = accelerator(distributed_type=DistributedType.MULTI_CPU)
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "true"}):
        sharding.check(here, module, True)
    sharding.check(here, module, True)
    assert caplog.messages == ["Accelerate shards on accelerators alone: here each process has all of the student"]
