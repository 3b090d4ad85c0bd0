"""How ninja compiles csrc/: the one table of flags, for setup.py (ahead of time) and native.py (just in time).

setup.py loads this file by its path, so it imports nothing of kdkernels and no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen, TimeoutExpired

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
LIBRARY = "native.so"
TIMEOUT = 600.0  # seconds that a build may take


class BuildError(RuntimeError):
    """csrc/ cannot be built here; the message says what is missing or what the compiler said first."""


@dataclass(frozen=True)
class Torch:
    """Where torch's headers and libraries are."""

    root: Path
    version: str


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


def find_ninja() -> str:
    """The binary in the ninja package: a virtual environment that is not activated does not have it on PATH."""
    try:
        import ninja
    except ImportError as error:
        raise BuildError("ninja is not installed in this environment: pip install ninja") from error
    return str(Path(ninja.BIN_DIR) / "ninja")


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
    best, names = _machines_isa(), all_isas()
    forced = os.environ.get("KDKERNELS_ISA") or best
    if forced not in names:
        raise BuildError(f"KDKERNELS_ISA must be one of {', '.join(names)}, got {forced!r}")
    if names.index(forced) > names.index(best):
        raise BuildError(f"KDKERNELS_ISA is {forced}, and this machine has {best} at most")
    return forced


def _machines_isa() -> str:
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
    """A build: what is made of the same sources is a function of these alone."""

    sources: Path
    torch: Torch
    compiler: str
    ninja: str
    isas: tuple[str, ...]
    cuda: Path | None = None
    architectures: tuple[str, ...] = ARCHITECTURES

    def key(self) -> str:
        """The name of a folder for this build, whatever the sources say."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def files(self) -> list[Path]:
        """All of csrc/, the largest first: they take longest to compile."""
        files = [path for path in self.sources.iterdir() if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
        return sorted(files, key=lambda path: (-path.stat().st_size, path.name))

    def calls(self) -> list[tuple[str, list[str], list[str]]]:
        """What is made, what of and how, with paths in the build's folder: the objects, then the library."""
        cxx = [self.compiler, *CXX_FLAGS]
        # the bindings alone know what is in the library, so that kernels are the same objects in all of them
        torch = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-isystem{self.torch.root / 'include'}"]
        if len(self.isas) == 1:
            torch.append(f"-DKD_ONLY={self.isas[0]}")
        libraries = [f"-L{self.torch.root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        if self.cuda:
            torch += ["-DKD_CUDA", f"-isystem{self.cuda / 'include'}"]
            # static: the library must load where there is no CUDA runtime, or another one
            libraries += [f"-L{self.cuda / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        calls: list[tuple[str, list[str], list[str]]] = []

        def add(path: Path, kind: str, *command: str) -> None:
            source, output = f"csrc/{path.name}", f"{path.stem}.{kind}.o"
            calls.append((output, [source], [*command, "-MMD", "-MF", f"{output}.d", "-c", source, "-o", output]))

        for path in self.files():
            if path.name == "bindings.cpp":
                add(path, "torch", *cxx, "-O2", *torch)
            elif path.suffix == ".cpp":
                for isa in self.isas:
                    add(path, isa, *cxx, *KERNEL_FLAGS, *ISA_FLAGS[isa], f"-DKD_ISA={isa}")
            elif path.suffix == ".cu" and self.cuda:
                codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
                codes.append(f"-gencode=arch=compute_{self.architectures[-1]},code=compute_{self.architectures[-1]}")
                add(path, "cuda", f"{self.cuda}/bin/nvcc", *NVCC_FLAGS, *codes)
        objects = [output for output, _, _ in calls]
        calls.append((LIBRARY, objects, [self.compiler, "-shared", *objects, *libraries, "-o", LIBRARY]))
        return calls

    def tools(self) -> str:
        """What neither the commands nor the sources tell: the versions of all that works on them."""
        compilers = [self.compiler, *([f"{self.cuda}/bin/nvcc"] if self.cuda else [])]
        versions = [_run([compiler, "--version"]) for compiler in compilers]
        return "\n".join([f"torch {self.torch.version} {platform.machine()}", *versions])

    def fingerprint(self) -> str:
        """Names the library that comes out: of these sources, by these commands and tools."""
        digest = hashlib.sha256(repr([self.tools(), self.calls()]).encode())
        for path in self.files():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:32]

    def ninja_file(self) -> str:
        from ninja.ninja_syntax import Writer, escape

        text = StringIO()
        writer = Writer(text)  # type: ignore[arg-type]  # its stub asks for a str
        writer.rule("compile", "$call", description="$out", depfile="$out.d", deps="gcc")
        writer.rule("link", "$call", description="$out")
        for output, inputs, call in self.calls():
            rule, variables = "link" if output == LIBRARY else "compile", {"call": escape(shlex.join(call))}
            writer.build([output], rule, inputs, implicit=["tools"], variables=variables)
        return text.getvalue()


def plan(package: Path, *, isas: Sequence[str], cuda: bool) -> Plan:
    """What to build here, or a BuildError that names what is missing."""
    toolkit = find_cuda() if cuda else None
    given = find_sources(package), find_torch(), find_compiler(), find_ninja(), tuple(isas), toolkit
    return Plan(*given, _architectures())


def _architectures() -> tuple[str, ...]:
    """Those of the GPUs to build for: ARCHITECTURES, or KDKERNELS_CUDA_ARCHITECTURES."""
    given = os.environ.get("KDKERNELS_CUDA_ARCHITECTURES")
    if not given:
        return ARCHITECTURES
    names = given.replace(",", " ").split()
    if not names or not all(name.isdigit() and int(name) >= 80 for name in names):
        raise BuildError(f"KDKERNELS_CUDA_ARCHITECTURES must be numbers from 80 on, as in '80,90', got {given!r}")
    return tuple(sorted(names, key=int))


def _first_error(tool: str, said: str) -> str:
    """Who failed, and with what first. Under ninja it is the compiler whose call stands below FAILED."""
    failed = re.search(r"^FAILED: .*\n(.*)\n((?s:.*))", said, re.M)
    if failed:
        tool, said = shlex.split(failed[1])[0], failed[2]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|cannot find|undefined reference", line)]
    return f"{Path(tool).name} failed: {(errors or lines or ['it said nothing'])[0][:300]}"


def _run(command: list[str]) -> str:
    """The command's output; a BuildError with the first error if it fails."""
    try:
        process = Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, errors="replace")
        said, _ = process.communicate(timeout=TIMEOUT)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    except TimeoutExpired as error:
        process.terminate()  # a kill would leave ninja's compilers at work
        raise BuildError(f"{command[0]} was stopped: it took more than {TIMEOUT:.0f} s") from error
    if process.returncode:
        raise BuildError(_first_error(command[0], said))
    return said


def prepare(plan: Plan, folder: Path) -> list[str]:
    """Lay out ``folder`` and return the call of ninja that builds there what has changed.

    The sources are copied, each when its text changes: ninja goes by time, and installers give new files old times.
    """
    contents = {folder / "csrc" / path.name: path.read_bytes() for path in plan.files()}
    contents[folder / "tools"] = plan.tools().encode()  # every object depends on these
    contents[folder / "build.ninja"] = plan.ninja_file().encode()
    (folder / "csrc").mkdir(parents=True, exist_ok=True)
    for path in {*(folder / "csrc").iterdir()} - {*contents}:
        path.unlink()
    for path, content in contents.items():
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
    return [plan.ninja, "-C", str(folder)]


def build(plan: Plan, folder: Path, output: Path) -> str:
    """Build in ``folder`` and put the library at ``output``, whole or not at all. Returns what the compilers said."""
    said = _run(prepare(plan, folder))
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}")
    shutil.copyfile(folder / LIBRARY, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())  # loading a library that a power failure has cut short can kill the process
    os.replace(temporary, output)
    return said
