"""Tests keep what is theirs in the checkout's build/ or in temporary folders, and write nowhere else.

To be imported before anything that builds or compiles.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "cache"
COMPILER = ROOT / "tests" / "compiler"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
found: list[str] = []  # writes elsewhere since the last test


def _environment(run: Path) -> dict[str, str]:
    """Caches for all processes of a run. What is named after all that it is made of may outlive it: of Inductor's, the
    C++ that it has compiled, but no graph, for it knows ops by name alone."""
    own = {
        "XDG_CACHE_HOME": str(KEPT),  # the native library, and everybody else's downloads and fonts
        "TRITON_CACHE_DIR": str(KEPT / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(KEPT / f"inductor-{importlib.metadata.version('torch')}"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # there are as many workers of pytest as cores
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # or Inductor first compiles a program for each instruction set
        "OMP_WAIT_POLICY": "PASSIVE",  # and their threads must not spin
        "HF_HUB_OFFLINE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(run / "hypothesis"),
    }
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler and compiler != str(COMPILER):
        own |= {"REAL_CXX": compiler, "CXX": str(COMPILER)}
    toolkits = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"))
    if toolkit := next((Path(path) for path in toolkits if Path(path, "bin", "nvcc").exists()), None):
        own |= {"REAL_NVCC": f"{toolkit}/bin/nvcc", "CUDA_HOME": str(_with_our_compiler(toolkit))}
    return own


def _with_our_compiler(toolkit: Path) -> Path:
    """The CUDA toolkit, at a place that is the same in each run."""
    ours = KEPT / "cuda"
    (ours / "bin").mkdir(parents=True, exist_ok=True)
    for link, target in {"bin/nvcc": COMPILER, "include": toolkit / "include", "lib64": toolkit / "lib64"}.items():
        if (ours / link).resolve() != target.resolve():
            (ours / link).unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):  # another run was faster
                (ours / link).symlink_to(target)
    return ours


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


# or each process would rewrite the assertions of all tests anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if "TESTS_RUN" not in os.environ:  # workers, and what tests start, have the environment of the first process
    RUN = Path(tempfile.mkdtemp(prefix="kdkernels-"))
    atexit.register(shutil.rmtree, RUN, ignore_errors=True)
    os.environ |= _environment(RUN) | {"TESTS_RUN": str(RUN)}
_watch()
