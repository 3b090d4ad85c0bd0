"""What every test has, in the processes that run tests: conftest.py registers it there."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import interpreted
import isolation
import pytest
import torch
from checking import INTERPRETED, backends_under_test

import kdkernels

if INTERPRETED:
    interpreted.patch_once()


def pytest_collection_finish() -> None:
    gc.freeze()  # all that is imported and collected by now stays: there is no use in looking for garbage there


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
