from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kdkernels

sys.path.insert(0, str(Path(__file__).parent))  # tests share checking.py
sys.path.insert(0, str(Path(__file__).parents[1]))  # and the published formulas of benchmarks/
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import isolation
from checking import backends_under_test
from cuda_on_cpu import build
from cuda_on_cpu import library as cuda_on_cpu


def pytest_sessionstart() -> None:
    if mode := cuda_on_cpu.requested():
        if reason := build.why_not():
            pytest.exit(f"the CUDA kernels cannot run here: {reason}", returncode=0)
        cuda_on_cpu.install(mode)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first; pytest-xdist gives tests out in their order."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(params=backends_under_test())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op test runs on each backend of this machine, asked for by name."""
    with kdkernels.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _writes_nowhere_else() -> Iterator[None]:
    isolation.found.clear()
    yield
    assert not isolation.found


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without groups each worker would make anew what a group shares: pytest 9.2 ignores pytest-xdist 3.8's."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        pytest.exit("this pytest and this pytest-xdist know no groups: see constraints.txt", returncode=1)
