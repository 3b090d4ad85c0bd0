"""Tests keep what is theirs in the checkout's build/ or in temporary folders, and write nowhere else.

To be imported before anything that builds or compiles.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "cache"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
found: list[str] = []  # writes elsewhere since the last test


def _environment(run: Path) -> dict[str, str]:
    """Caches for all processes of a run. What is named after all that it is made of may outlive it; Inductor knows ops
    by name alone."""
    own = {
        "XDG_CACHE_HOME": str(KEPT),  # the native library, and everybody else's downloads and fonts
        "TRITON_CACHE_DIR": str(KEPT / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(run / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # there are as many workers of pytest as cores
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # or Inductor first compiles a program for each instruction set
        "OMP_WAIT_POLICY": "PASSIVE",  # and their threads must not spin
        "HF_HUB_OFFLINE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(run / "hypothesis"),
    }
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler and compiler != str(ROOT / "tests" / "compiler"):
        own |= {"REAL_CXX": compiler, "CXX": str(ROOT / "tests" / "compiler")}
    return own


def _watch() -> None:
    """From here on, note what this process writes outside."""
    allowed = [tempfile.gettempdir(), "/dev", "/proc", *(str(ROOT / name) for name in ("build", ".pytest_cache"))]

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(args[2], int) or not args[2] & WRITES:
            return
        if isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(args[0]))
            if not path.startswith(tuple(allowed)) and "__pycache__" not in path:
                found.append(path)

    sys.addaudithook(hear)


if "TESTS_RUN" not in os.environ:  # workers, and what tests start, have the environment of the first process
    RUN = Path(tempfile.mkdtemp(prefix="kdkernels-"))
    atexit.register(shutil.rmtree, RUN, ignore_errors=True)
    os.environ |= _environment(RUN) | {"TESTS_RUN": str(RUN)}
_watch()
