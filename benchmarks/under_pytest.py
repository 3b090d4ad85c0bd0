"""The cases under pytest-benchmark: ``pytest benchmarks -k "kd and 256"``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdkernels.ops.backend import MODULES

from .cases import PEERS, Case, check, errors, oracle, providers
from .timing import CUDA, cold, spoil

PROVIDERS = (*MODULES, *PEERS)


def run_case(benchmark: Any, case: Case, name: str) -> None:
    """Check the provider's numbers, then time its step: forward and backward on cold inputs."""
    inputs = case.inputs()
    torch._dynamo.reset()
    provider = providers(case, inputs, [name]).get(name)
    if provider is None:
        pytest.skip(f"{name} does not run {case.label} here")
    check(case, name, errors(provider, inputs, oracle(case, inputs)))
    copies = cold(case, inputs)

    def step() -> None:
        provider.step(next(copies))
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = case.label
    benchmark.pedantic(step, setup=spoil if CUDA else None, rounds=10, warmup_rounds=1)
