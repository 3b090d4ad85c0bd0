"""Compiles csrc/ for the executor, object by object, into build/cuda_on_cpu/.

An object is named after a digest of what it is made of, so nothing is compiled twice.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from kdkernels.ops import native_build

from .sources import csrc, included, to_cpp

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_on_cpu"
WORKERS = 2

# One build rounds a * b + c once and the other twice: nvcc may do either.
_COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-ftrivial-auto-var-init=pattern", "-w"]
_FRAMES = ["-fno-omit-frame-pointer", "-fno-thread-jumps"]  # barriers are told apart by the calls that lead to them
MODES = {
    "plain": ["-O2", "-ffp-contract=fast"],
    "checked": ["-O1", "-g1", "-ffp-contract=off", "-fno-tree-sra", *_FRAMES, "-fsanitize=thread,bounds,alignment"],
}
_WRAPPED = (
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
    "aoti_torch_device_type_cuda",
    "aoti_torch_empty_strided",
    "aoti_torch_get_data_ptr",
    "torch_get_const_data_ptr",
    "torch_get_mutable_data_ptr",
    "torch_library_impl",
)
_KERNELS_OF_THE_CPU = "_ZN2kd7computeILNS_3IsaE*"  # compute<Isa>: what bindings.cpp calls for CPU tensors, never here


def why_not() -> str | None:
    """None if the executor can be built here, else the reason."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "the executor's context switch is written for x86-64 Linux"
    try:
        native_build.find_compiler()
        native_build.find_torch()
    except native_build.BuildError as error:
        return str(error)
    return None


@cache
def _runtime() -> dict[str, str]:
    files = sorted((HERE / "runtime").rglob("*.*"))
    return {str(path.relative_to(HERE / "runtime")): path.read_text() for path in files}


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@cache
def _compiler() -> tuple[str, str]:
    path = native_build.find_compiler()
    return path, subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def appear(output: Path, make: Callable[[Path], None]) -> Path:
    """``output``, made unless it is there; whole or not at all, whoever else makes it at the same time."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_name(f".{os.getpid()}-{threading.get_ident()}-{output.name}")
        make(part)
        os.replace(part, output)
    return output


def _write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        appear(folder / name, lambda part, text=text: part.write_text(text))  # type: ignore[misc]
    return folder


def _compile(name: str, text: str, headers: Mapping[str, str], flags: list[str]) -> Path:
    compiler, version = _compiler()
    headers = included(text, headers)
    own_headers = sorted((n, t) for n, t in _runtime().items() if n.endswith(".h"))
    key = digest(name, text, repr(sorted(headers.items())), repr(own_headers), repr(flags), version)
    includes = _write(CACHE / f"headers-{digest(repr(sorted(headers.items())))}", headers)
    runtime = HERE / "runtime"
    includes_flags = [f"-I{folder}" for folder in (includes, runtime / "include", runtime)]

    def make(part: Path) -> None:
        source = part.with_suffix(".cpp")
        source.write_text(text)
        _run([compiler, *_COMMON, *flags, *includes_flags, "-c", str(source), "-o", str(part)])
        if name == "bindings.cpp":
            _run(["objcopy", "--wildcard", f"--weaken-symbol={_KERNELS_OF_THE_CPU}", str(part)])
        source.unlink()

    return appear(CACHE / f"{name}-{key}.o", make)


def _kernel_flags(mode: str) -> list[str]:
    fma = ["-mfma"] if mode == "plain" and native_build.host_isa() != "base" else []
    return ["-D__CUDACC__", "-include", "cuda_runtime.h", *MODES[mode], *fma]  # as nvcc does


def _link(objects: list[Path], libraries: list[str], name: str) -> Path:
    def make(part: Path) -> None:
        wrap = [f"-Wl,--wrap={symbol}" for symbol in _WRAPPED] if libraries else []
        _run([_compiler()[0], "-shared", *map(str, objects), *wrap, "-Wl,-z,defs", *libraries, "-ldl", "-o", str(part)])

    return appear(CACHE / f"{name}-{digest(*(o.name for o in objects), *libraries)}.so", make)


Job = tuple[str, str, Mapping[str, str], list[str]]  # what _compile takes


def _core() -> list[Job]:
    files = [(n, t) for n, t in _runtime().items() if n.endswith(".cpp") and n != "torch_library.cpp"]
    return [(name, text, {}, ["-O2", *_FRAMES]) for name, text in files]


def _compile_all(jobs: list[Job]) -> list[Path]:
    """The objects in the order of the jobs; what takes longest is begun first."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(reversed(list(pool.map(lambda job: _compile(*job), reversed(jobs)))))


def library(mode: str, files: Mapping[str, str] | None = None) -> Path:
    """csrc/ (or ``files`` in its place) on the executor, to be loaded into torch instead of the native library."""
    files = files or csrc()
    headers = {n: to_cpp(t, f"csrc/{n}") for n, t in files.items() if n.endswith((".h", ".cuh"))}
    torch = native_build.find_torch()
    bindings = ["-O1", "-DKD_CUDA", "-DKD_ONLY=base", f"-isystem{torch.root / 'include'}"]
    bindings += [f"-DTORCH_TARGET_VERSION={native_build.TORCH_TARGET}", f'-DTORCH_VERSION_HERE="{torch.version}"']
    # the linker keeps the first of equal inline functions: the executor's own must not be the instrumented ones
    jobs = _core()
    jobs += [("torch_library.cpp", _runtime()["torch_library.cpp"], {}, bindings)]
    jobs += [("bindings.cpp", f'#line 1 "csrc/bindings.cpp"\n{files["bindings.cpp"]}', headers, bindings)]
    jobs += [(n, to_cpp(t, f"csrc/{n}"), headers, _kernel_flags(mode)) for n, t in files.items() if n.endswith(".cu")]
    return _link(_compile_all(jobs), [f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"], f"library-{mode}")


def probe(mode: str, source: Path) -> Path:
    """A library of one .cu file beside this one, for ctypes: no torch in it."""
    headers = {n: to_cpp(t, f"csrc/{n}") for n, t in csrc().items() if n.endswith(".cuh")}
    text = to_cpp(source.read_text(), str(source.relative_to(ROOT)))
    jobs = [*_core(), (source.name, text, headers, _kernel_flags(mode))]
    return _link(_compile_all(jobs), [], f"{source.stem}-{mode}")
