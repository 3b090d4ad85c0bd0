"""The executor's library as the native backend of kdkernels, for CPU tensors, in this process.

All that knows how kdkernels finds its native library is in ``install``.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from kdkernels.ops import native

from . import build


def requested() -> str | None:
    """plain or checked where the op tests are to run csrc/*.cu on the executor."""
    mode = os.environ.get("KDKERNELS_TEST_CUDA")
    if mode and mode not in build.MODES:
        raise ValueError(f"KDKERNELS_TEST_CUDA must be one of {', '.join(build.MODES)}, got {mode!r}")
    return mode or None


def install(mode: str, files: Mapping[str, str] | None = None) -> ctypes.CDLL:
    """Build and load: from here on the native backend is the CUDA kernels. The real library must not be loaded."""
    path = build.library(mode, files)

    def load() -> None:
        torch.ops.load_library(str(path))

    native._find_and_load = load
    reason = native.why_not()
    assert reason is None, reason
    return ctypes.CDLL(str(path))


Place = tuple[str, ...]  # "gram.cu:54", innermost first: the lines of csrc that led to an access


class Launch(NamedTuple):
    """One kernel launch. The bytes of global memory are counted in the checked build alone, what is below them there
    after ``library.cuda_on_cpu_count(1)``: accesses of warps, 32-byte sectors, passes over the banks beyond the first.

    After ``library.cuda_on_cpu_sample(n)`` as well only n blocks of each launch run, at any shape, unchecked and with
    results that are not right; what they touched is counted by place too, shared memory included. Where the last block
    of several goes on alone, the last one of the sample stands for it, if it is found by ``atomicInc(counter, n - 1)``:
    ``last_bytes`` and ``last_sectors`` are what one such block does from the next barrier on.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_shared: int
    static_shared: int
    read: int
    written: int
    distinct_read: int
    distinct_written: int
    global_requests: int
    sectors: int
    shared_requests: int
    bank_conflicts: int
    blocks_run: int
    sectors_once: int
    last_sectors: int
    kernel_with_types: str
    bytes: dict[Place, int]
    last_bytes: dict[Place, int]


def launches(library: ctypes.CDLL) -> list[Launch]:
    """The launches since this was last asked, the latest 10,000 at most."""
    library.cuda_on_cpu_launches.restype = ctypes.c_char_p
    lines = [line.split("\t") for line in library.cuda_on_cpu_launches().decode().splitlines()]
    sources = _sources(library._name, {int(x) for line in lines for x in re.findall(r" (\d+)", "".join(line[-2:]))})
    found = []
    for name, grid, block, *numbers, address, paths, last_paths in lines:
        sizes = [tuple(map(int, text.split())) for text in (grid, block)]
        places = [_by_place(text, sources) for text in (paths, last_paths)]
        found.append(Launch(name, *sizes, *map(int, numbers), _function(library._name, int(address)), *places))  # type: ignore[arg-type]
    return found


def _by_place(paths: str, sources: Mapping[int, Place]) -> dict[Place, int]:
    places: dict[Place, int] = {}
    for path in paths.split(";")[:-1]:
        bytes_, *offsets = map(int, path.split())
        place = sum((sources[offset] for offset in offsets), ())
        places[place] = places.get(place, 0) + bytes_
    return places


@cache
def _function(path: str, offset: int) -> str:
    """forward_kernel<float, true> and the like, without namespaces and parameters."""
    command = ["addr2line", "-f", "-C", "-e", path, hex(offset)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return plain_name(said.splitlines()[0])


def plain_name(name: str) -> str:
    """A demangled kernel's name with its template arguments alone."""
    name = re.sub(r"^void |\w+::|\(anonymous namespace\)::", "", name)
    depth = 0
    for at, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:at].strip()
    return name.strip()


def _sources(path: str, offsets: Collection[int]) -> dict[int, Place]:
    """Lines of csrc that instructions of the library came from, with what was inlined where."""
    command = ["addr2line", "-a", "-i", "-e", path]
    asked = "\n".join(map(hex, offsets))
    said = subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout if offsets else ""
    found = {}
    for part in re.split(r"^0x", said, flags=re.M)[1:]:
        lines = re.findall(r"^(?:.*/)?(?:csrc|cuda_on_cpu)/([^/\s]+):(\d+)", part, re.M)
        found[int(part.partition("\n")[0], 16)] = tuple(f"{file}:{line}" for file, line in lines)
    return found


class Probe:
    """A library of one .cu file for tests of the executor itself: call ``run`` with what may be touched."""

    def __init__(self, mode: str, source: Path) -> None:
        self.library = ctypes.CDLL(str(build.probe(mode, source)))
        self.library.cuda_on_cpu_error.restype = ctypes.c_char_p

    def run(self, function: str, *arguments: torch.Tensor | int, outputs: tuple[int, ...] = ()) -> str:
        """Call an extern "C" function; the arguments numbered in ``outputs`` may be written. What went wrong, or ""."""
        passed = []
        self.library.cuda_on_cpu_forget()
        for i, x in enumerate(arguments):
            if isinstance(x, torch.Tensor):
                pointer = ctypes.c_void_p(x.data_ptr())
                self.library.cuda_on_cpu_allow(pointer, ctypes.c_size_t(x.nbytes), int(i in outputs))
                passed.append(pointer)
            else:
                passed.append(ctypes.c_int(x))
        getattr(self.library, function)(*passed)
        return self.library.cuda_on_cpu_error().decode()
