"""Triton's launchers against a CUDA driver on which nothing runs (libcuda.c): what they hand over, and what that takes
of the host's time.

Triton builds its launcher against this libcuda.so.1, which is loaded first. Tensors stay on the CPU: the driver takes
any address for one of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("libcuda.c")
CACHE = Path(__file__).parents[2] / "build" / "stub_driver"


def why_not() -> str | None:
    """None if the stub can be built here and Triton is there to use it, else the reason."""
    try:
        import triton
    except ImportError:
        return "no triton"
    if triton.knobs.runtime.interpret:
        return "Triton interprets its kernels in this process"
    if shutil.which("gcc") is None:
        return "no gcc"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python.h, which Triton's launcher needs"
    return None


class Launch(NamedTuple):
    """A launch as the driver gets it; the arguments by their offsets in the kernel's parameters."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    arguments: dict[int, bytes]


@cache
def library() -> ctypes.CDLL:
    """libcuda.so.1 of this folder, built once and loaded in front of any other."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    folder = CACHE / hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:20]
    output = folder / "libcuda.so.1"
    if not output.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{os.getpid()}.so"
        command = ["gcc", "-O2", "-Wall", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, str(SOURCE), "-o", str(part)], check=True)
        os.replace(part, output)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    loaded = ctypes.CDLL(str(output), mode=ctypes.RTLD_GLOBAL)
    loaded.stub_launches.restype = ctypes.c_char_p
    return loaded


def launches() -> list[Launch]:
    """Since this was last asked."""
    found = []
    for line in library().stub_launches().decode().splitlines():
        name, grid, block, shared, arguments = line.split("\t")
        sizes = [tuple(map(int, text.split())) for text in (grid, block)]
        by_offset = dict(argument.split(":") for argument in arguments.split())
        bytes_at = {int(offset): bytes.fromhex(text) for offset, text in by_offset.items()}
        found.append(Launch(name, sizes[0], sizes[1], int(shared), bytes_at))
    return found


@cache
def _driver() -> Any:
    library()
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.set_current_device = lambda device: None
    driver.get_device_capability = lambda device=0: (9, 0)
    return driver


@contextmanager
def active(recording: bool = True) -> Iterator[None]:
    """Triton compiles for sm_90 and launches on the stub; with ``recording`` each launch is written down."""
    import triton

    config = triton.runtime.driver
    before = dict(vars(config))
    config.set_active(_driver())
    library().stub_record(int(recording))
    try:
        yield
    finally:
        vars(config).update(before)
