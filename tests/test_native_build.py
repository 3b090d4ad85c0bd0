"""How the native library is built, found and loaded, and everything that can go wrong with that."""

from __future__ import annotations

import importlib.metadata
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from native_tools import PROBE, ROOT, compiler, copy_of_the_checkout, outcome, start

from kdkernels.ops import native, native_build

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("build")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that eight processes have filled at once."""
    compiler()
    folder = tmp_path_factory.mktemp("cache")
    outcomes = [outcome(process) for process in [start(folder) for _ in range(8)]]
    assert [reason for reason, _ in outcomes] == ["None"] * 8
    assert sum("building the native" in output for _, output in outcomes) == 1
    return folder


def library_in(cache: Path) -> Path:
    (library,) = cache.glob("kdkernels/*/*.so")
    return library


def test_native_is_there_where_a_compiler_is() -> None:
    compiler()
    if native.INSTALLED.exists() or os.environ.get("KDKERNELS_JIT") != "0":
        assert native.why_not() is None


@pytest.mark.xdist_group("cache")
def test_eight_processes_at_once_build_once(cache: Path) -> None:
    library = library_in(cache)
    for folder in (cache / "kdkernels", library.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in library.parent.iterdir()} == {library.name, "build", "lock"}
    reason, output = outcome(start(cache))
    assert reason == "None"
    assert "building" not in output


@pytest.mark.xdist_group("cache")
@pytest.mark.parametrize("content", [b"", b"made elsewhere"])
def test_a_library_that_cannot_be_loaded_is_built_anew(cache: Path, content: bytes) -> None:
    library_in(cache).write_bytes(content)
    reason, output = outcome(start(cache))
    assert reason == "None"
    assert "building the native" in output


def test_without_a_compiler(tmp_path: Path) -> None:
    unconfigured = PROBE.replace("logging.basicConfig(level=logging.INFO)", "")  # as users have it
    reason, output = outcome(start(tmp_path, unconfigured, PATH=str(tmp_path)))
    assert "no C++ compiler found: install g++" in reason
    (line,) = output.partition("REASON")[0].splitlines()
    assert line == f"the native kernels are not available, slower ones take their place: {reason}"
    _, output = outcome(start(tmp_path, unconfigured, KDKERNELS_JIT="0"))
    assert output.startswith("REASON"), "whoever forbids the build is not told that it was not made"


@pytest.mark.parametrize("version_works", [False, True])
def test_with_a_compiler_that_fails(tmp_path: Path, version_works: bool) -> None:
    fake = tmp_path / "g++"
    success = '[ "$1" = --version ] && exit 0' if version_works else ""
    fake.write_text(
        f"#!/bin/sh\n{success}\necho 'In file included from x.h:' >&2\necho 'x.h:1:2: error: broken' >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    reason, output = outcome(start(tmp_path / "cache", PATH=f"{tmp_path}:/bin:/usr/bin"))
    assert "g++ failed: x.h:1:2: error: broken" in reason
    assert "the native kernels are not available" in output


@pytest.mark.parametrize("why", ["Not a directory", "File too large"])
def test_with_a_cache_that_cannot_be_written(tmp_path: Path, why: str) -> None:
    compiler()
    cache, code = tmp_path / "cache", PROBE
    if why == "Not a directory":
        cache.touch()
    else:  # the nearest to a full disk
        code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))" + PROBE
    reason, _ = outcome(start(cache, code))
    assert reason.endswith(f"kdkernels cannot be written ({why}): set XDG_CACHE_HOME to a folder that can")


def test_with_another_users_cache(tmp_path: Path) -> None:
    compiler()
    (tmp_path / "kdkernels").mkdir()
    reason, _ = outcome(start(tmp_path, "import os; os.getuid = lambda: 12345" + PROBE))
    assert f"the cache {tmp_path / 'kdkernels'} belongs to another user: set XDG_CACHE_HOME" in reason


def test_with_another_users_lock_held(tmp_path: Path) -> None:
    compiler()
    impatient = "from kdkernels.ops import native; native.LOCK_TIMEOUT = 0.3"
    plan = native_build.plan(native.PACKAGE, isas=[native_build.host_isa()], cuda=False)
    folder = tmp_path / "kdkernels" / plan.key()
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        reason, _ = outcome(start(tmp_path, impatient + PROBE))
    assert "another process has held" in reason


def test_jit_forbidden(tmp_path: Path) -> None:
    reason, output = outcome(start(tmp_path, KDKERNELS_JIT="0"))
    assert "KDKERNELS_JIT=0 forbids" in reason
    assert "building the native" not in output
    process = start(tmp_path, KDKERNELS_JIT="0", KDKERNELS_BACKEND="native")
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "backend 'native' was asked for by name and cannot run gram: it was not built" in output


def test_importing_builds_nothing(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ninja'] = sys.modules['filelock'] = None  # for builds alone\n"
    code += "import torch, kdkernels, kdkernels.ops.native"
    process = start(tmp_path, code)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert not list(tmp_path.iterdir())


def test_fingerprint_follows_sources_flags_and_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler()
    (tmp_path / "csrc").mkdir()
    for path in native_build.find_sources(native.PACKAGE).glob("*.*"):
        (tmp_path / "csrc" / path.name).write_bytes(path.read_bytes())

    def fingerprint(isa: str = "base") -> str:
        return native_build.plan(tmp_path, isas=[isa], cuda=False).fingerprint()

    seen = {fingerprint()}
    assert fingerprint() in seen
    seen.add(fingerprint(native_build.all_isas()[-1]))
    monkeypatch.setattr(native_build, "KERNEL_FLAGS", ["-O2"])
    seen.add(fingerprint())
    with (tmp_path / "csrc" / "gram.cpp").open("a") as file:
        file.write("// changed\n")
    seen.add(fingerprint())
    monkeypatch.setattr(native_build, "find_torch", lambda: native_build.Torch(tmp_path, "9.9"))
    seen.add(fingerprint())
    assert len(seen) == 5


def run_op_tests(cache: Path, package: Path, **environment: str) -> None:
    """Every op's numbers on the native backend in a process of its own, with kdkernels from ``package``."""
    chosen = "native and (golden or meets or layers or each_term or huge)"
    if environment["KDKERNELS_ISA"] == native_build.host_isa():
        chosen = "native and golden"  # its kernels are the objects that all other tests run
    files = [str(ROOT / "tests" / name) for name in ("ops", "test_golden.py")]
    code = f"""
import sys, torch, pytest
torch.set_num_threads(2)
import kdkernels
assert kdkernels.__file__.startswith({str(package)!r})
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", {chosen!r}, *{files}]))
"""
    process = start(cache, code, PYTHONPATH=str(package), **environment)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-4000:]
    assert "passed" in output


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel with the library in it, CUDA's part too where nvcc is, and what the compilers said."""
    compiler()
    # not find_spec: looking for pip changes for good which distutils this process gets, and Inductor fails then
    if not {"pip", "setuptools"} <= {found.name for found in importlib.metadata.distributions()}:
        pytest.skip("needs pip and setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_the_checkout(folder / "source")
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    # one architecture: nothing in csrc/ depends on it, and each takes a minute
    env = {**os.environ, "KDKERNELS_BUILD_NATIVE": "1", "KDKERNELS_CUDA_ARCHITECTURES": "90"}
    command = [*pip, "-w", str(folder), str(source)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    return path, done.stdout + done.stderr


def test_everything_compiles_without_warnings(wheel: tuple[Path, str]) -> None:
    said = [line for line in wheel[1].splitlines() if "warning" in line.lower() and ("csrc/" in line or "#" in line)]
    assert not said, "\n".join(said)


def test_the_cuda_sources_are_in_the_wheel(wheel: tuple[Path, str]) -> None:
    if native_build.find_cuda() is None:
        pytest.skip("no nvcc: the CUDA sources cannot be compiled here")
    assert "building the native kernels for the CPU and CUDA" in wheel[1]


@pytest.fixture(scope="module")
def installed(wheel: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert wheel[0].name.endswith(".whl")
    assert "-cp310-abi3-" in wheel[0].name
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel[0])]
    subprocess.run(command, check=True, timeout=240)
    return target


def test_the_library_of_the_wheel_is_taken(installed: Path, tmp_path: Path) -> None:
    check = "import kdkernels.ops.native as n; assert n.INSTALLED.exists(); print(n.why_not(), n.PACKAGE)"
    if native_build.find_cuda() and not torch.cuda.is_available():
        # the library has CUDA code in it, and this torch may have none: it loads all the same
        check += "; import torch; assert hasattr(torch.ops.kdkernels_native, 'cuda_status')"
    environment = {"PYTHONPATH": str(installed), "KDKERNELS_JIT": "0"}
    output, _ = start(tmp_path, check, **environment).communicate(timeout=240)
    assert output.strip() == f"None {installed / 'kdkernels'}"
    wrong = check.partition(";")[0] + "; print(n.why_not())"
    output, _ = start(tmp_path, wrong, KDKERNELS_ISA="avx7", **environment).communicate(timeout=240)
    assert "KDKERNELS_ISA must be one of" in output


@pytest.mark.parametrize("isa", native_build.all_isas())
def test_every_instruction_set_of_the_wheel_gives_the_same_numbers(isa: str, installed: Path, tmp_path: Path) -> None:
    if native_build.all_isas().index(isa) > native_build.all_isas().index(native_build.host_isa()):
        pytest.skip(f"this machine has no {isa}")
    run_op_tests(tmp_path, installed, KDKERNELS_JIT="0", KDKERNELS_ISA=isa)


def test_without_torch_the_wheel_is_pure_python_and_has_the_sources(tmp_path: Path) -> None:
    source = copy_of_the_checkout(tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    environment = {**os.environ, "KDKERNELS_BUILD_NATIVE": "0"}
    done = subprocess.run(pip, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (path,) = tmp_path.glob("*.whl")
    assert path.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(path).namelist()
    assert {f"kdkernels/csrc/{p.name}" for p in (ROOT / "csrc").glob("*.*")} <= set(names)
    assert not [name for name in names if name.endswith(".so")]
