"""How csrc/ is compiled: the one table of flags, for setup.py (ahead of time) and native.py (just in time).

setup.py loads this file by its path, so it imports nothing of kdkernels and no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

OPS = ("softmax_kl", "gram", "angular_margin")
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11
ISA_FLAGS = {
    "base": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}
CXX_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
# loops are vectorised; sums are reordered only where the source says so, and NaN and infinity mean what they say
KERNEL_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
ARCHITECTURES = ("80", "90")
WORKERS = 2
TIMEOUT = 600  # seconds that one compiler call may take


class BuildError(RuntimeError):
    """csrc/ cannot be built here; the message says what is missing or what the compiler said first."""


@dataclass(frozen=True)
class Torch:
    """Where torch's headers and libraries are."""

    root: Path
    version: str

    @property
    def includes(self) -> list[str]:
        return [f"-isystem{self.root / 'include'}"]


def find_torch() -> Torch:
    """torch's folder, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed in this environment (with pip: --no-build-isolation)")
    root = Path(spec.origin).parent
    if not (root / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        raise BuildError(f"torch's headers are not in {root / 'include'}: torch 2.11 or newer has them")
    match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (root / "version.py").read_text())
    return Torch(root, match[1] if match else "unknown")


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise BuildError("no C++ compiler found: install g++ (or set CXX to one)")


def find_cuda() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, CUDA_PATH, the default folder, and only then PATH, where nvcc may be a shim."""
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if folder and (Path(folder) / "bin" / "nvcc").exists():
            return Path(folder)
    nvcc = shutil.which("nvcc")
    root = Path(nvcc).resolve().parents[1] if nvcc else None
    return root if root and (root / "include" / "cuda_runtime.h").exists() else None


def find_sources(package: Path) -> Path:
    """csrc/: inside an installed package, beside it in a checkout."""
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "bindings.cpp").exists():
            return folder
    raise BuildError(f"the C++ sources are neither in {package / 'csrc'} nor in {package.parent / 'csrc'}")


def all_isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["base"]


def host_isa() -> str:
    """The best instruction set of this machine, or KDKERNELS_ISA. A build for it alone takes a third of the time."""
    forced = os.environ.get("KDKERNELS_ISA")
    if forced:
        if forced not in all_isas():
            raise BuildError(f"KDKERNELS_ISA must be one of {', '.join(all_isas())}, got {forced!r}")
        return forced
    try:
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())  # type: ignore[index]
    except (OSError, TypeError):
        return "base"
    if platform.machine() not in ("x86_64", "AMD64") or "fma" not in flags:
        return "base"
    if {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= flags:
        return "avx512"
    return "avx2" if "avx2" in flags else "base"


@dataclass(frozen=True)
class Plan:
    """A build: the commands are a function of these alone."""

    sources: Path
    torch: Torch
    compiler: str
    isas: tuple[str, ...]
    cuda: Path | None = None
    architectures: tuple[str, ...] = ARCHITECTURES

    @property
    def defines(self) -> list[str]:
        only = [f"-DKD_ONLY={self.isas[0]}"] if len(self.isas) == 1 else []
        return [*only, *(["-DKD_CUDA"] if self.cuda else [])]

    def nvcc(self, source: Path, output: Path) -> list[str]:
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
        newest = self.architectures[-1]
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        return [f"{self.cuda}/bin/nvcc", *NVCC_FLAGS, *codes, "-c", str(source), "-o", str(output)]

    def compile_commands(self, folder: Path) -> list[list[str]]:
        commands = []
        for op in OPS:  # the longest first
            for isa in self.isas:
                flags = [*CXX_FLAGS, *KERNEL_FLAGS, *ISA_FLAGS[isa], *self.defines, f"-DKD_ISA={isa}"]
                source, output = self.sources / f"{op}.cpp", folder / f"{op}.{isa}.o"
                commands.append([self.compiler, *flags, "-c", str(source), "-o", str(output)])
            if self.cuda:
                commands.append(self.nvcc(self.sources / f"{op}.cu", folder / f"{op}.cuda.o"))
        flags = [*CXX_FLAGS, "-O2", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *self.torch.includes, *self.defines]
        if self.cuda:
            flags.append(f"-isystem{self.cuda / 'include'}")
        commands.append(
            [self.compiler, *flags, "-c", str(self.sources / "bindings.cpp"), "-o", str(folder / "bindings.o")]
        )
        return commands

    def link_command(self, folder: Path, output: Path) -> list[str]:
        objects = [command[-1] for command in self.compile_commands(folder)]
        libraries = [f"-L{self.torch.root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        if self.cuda:
            # static: the library must load where there is no CUDA runtime, or another one
            libraries += [f"-L{self.cuda / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return [self.compiler, "-shared", *objects, *libraries, "-o", str(output)]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(self.sources.glob("*.*")):
            if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        tools = [self.compiler, *([f"{self.cuda}/bin/nvcc"] if self.cuda else [])]
        for tool in tools:
            digest.update(_run([tool, "--version"]).encode())
        commands = [*self.compile_commands(Path("o")), self.link_command(Path("o"), Path("so"))]
        digest.update(repr([command[1:] for command in commands]).encode())
        digest.update(f"{self.torch.version} {platform.machine()}".encode())
        return digest.hexdigest()[:32]


def plan(package: Path, *, isas: Sequence[str], cuda: bool) -> Plan:
    """What to build here, or a BuildError that names what is missing."""
    toolkit = find_cuda() if cuda else None
    return Plan(find_sources(package), find_torch(), find_compiler(), tuple(isas), toolkit)


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|cannot find|undefined reference", line)]
    return (errors or lines or ["it said nothing"])[0][:300]


def _run(command: list[str]) -> str:
    """The command's output; a BuildError with the first error if it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        raise BuildError(f"{Path(command[0]).name} failed: {_first_error(output)}")
    return output


def build(plan: Plan, output: Path) -> list[str]:
    """Compile and link into ``output``, which appears whole or not at all. Returns what the compilers said."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output.parent) as name:
        folder = Path(name)
        with ThreadPoolExecutor(WORKERS) as pool:
            said = list(pool.map(_run, plan.compile_commands(folder)))
        library = folder / output.name
        said.append(_run(plan.link_command(folder, library)))
        os.replace(library, output)
    return [text for text in said if text.strip()]
