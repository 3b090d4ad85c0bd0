from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests share checking.py
sys.path.insert(0, str(Path(__file__).parents[1]))  # and the published formulas of benchmarks/
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import isolation  # noqa: F401  (before anything that builds or compiles)


def pytest_configure(config: pytest.Config) -> None:
    """Whoever hands tests out to workers runs none, and need not wait for torch."""
    if not getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
        config.pluginmanager.register(importlib.import_module("fixtures"), "of all tests")


def pytest_sessionstart() -> None:
    if os.environ.get("KDKERNELS_TEST_CUDA"):
        from cuda_on_cpu import build, library

        mode = library.requested()
        if reason := build.why_not():
            pytest.exit(f"the CUDA kernels cannot run here: {reason}", returncode=0)
        library.install(mode)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first; pytest-xdist gives tests out in their order."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without groups each worker would make anew what a group shares: pytest 9.2 ignores pytest-xdist 3.8's."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        pytest.exit("this pytest and this pytest-xdist know no groups: see constraints.txt", returncode=1)
