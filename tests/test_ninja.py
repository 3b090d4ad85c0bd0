"""What ninja makes again and what it leaves; builds that cannot begin, hang or are killed. On sources of few lines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from native_tools import PROBE, ROOT, compiler, copy_of_the_checkout, outcome, start

from kdkernels.ops import native_build
from kdkernels.ops.native_build import BuildError, Plan, Torch

pytestmark = pytest.mark.slow

ISAS = native_build.all_isas()
SOURCES = {
    "bindings.cpp": '#include "shared.h"\nint bindings() { return shared; }\n',
    "one.cpp": '#include "shared.h"\n#include "one.h"\nnamespace KD_ISA { int one() { return shared + other; } }\n',
    "two.cpp": '#include "shared.h"\nnamespace KD_ISA { int two() { return shared; } }\n',
    "gpu.cu": '#include "gpu.cuh"\n__global__ void gpu(int* x) { *x = device; }\n',
    "shared.h": "constexpr int shared = 1;\n",
    "one.h": "constexpr int other = 1;\n",
    "gpu.cuh": "constexpr int device = 1;\n",
}
ONE, TWO = ({f"{name}.{isa}.o" for isa in ISAS} for name in ("one", "two"))
LINK = {native_build.LIBRARY}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """For a folder whose name a shell and ninja would take apart."""
    monkeypatch.setenv("CXX", os.environ.get("REAL_CXX", ""))  # a line is compiled sooner than found in a cache
    compiler()
    csrc = tmp_path / "a $(b): 'c'" / "csrc"
    csrc.mkdir(parents=True)
    for name, text in SOURCES.items():
        (csrc / name).write_text(text)
    return native_build.plan(csrc.parent, isas=ISAS, cuda=True)


def build(plan: Plan) -> str:
    return native_build.build(plan, plan.sources.parent / "build", plan.sources.parent / "out" / "library.so")


def pending(plan: Plan) -> set[str]:
    """What ninja would make now."""
    command = [*native_build.prepare(plan, plan.sources.parent / "build"), "-n"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return set(re.findall(r"^\[\d+/\d+\] (.+)$", done.stdout, re.M))


def test_only_what_depends_on_a_change_is_made_again(plan: Plan) -> None:
    gpu = {"gpu.cuda.o"} if plan.cuda else set()
    assert pending(plan) == {"bindings.torch.o", *ONE, *TWO, *gpu, *LINK}
    build(plan)
    assert pending(plan) == set()
    expected = {
        "two.cpp": TWO | LINK,
        "one.h": ONE | LINK,
        "shared.h": {"bindings.torch.o", *ONE, *TWO, *LINK},
        "gpu.cuh": gpu | LINK if gpu else set(),
    }
    for name, made in expected.items():
        path = plan.sources / name
        before = path.stat().st_mtime
        path.write_text(SOURCES[name] + "// changed\n")
        os.utime(path, (before - 1e6, before - 1e6))  # as an installer may leave it, or another commit
        assert pending(plan) == made, name
        path.write_text(SOURCES[name])
        build(plan)
        assert "no work to do" in build(plan)


def test_other_flags_and_other_tools_make_other_objects(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(plan, cuda=None)
    build(plan)
    newer = replace(plan, torch=Torch(plan.torch.root, "9.9"))
    assert pending(newer) == {"bindings.torch.o", *ONE, *TWO, *LINK}
    build(plan)
    monkeypatch.setattr(native_build, "KERNEL_FLAGS", ["-O1"])
    assert pending(plan) == ONE | TWO | LINK


def test_an_include_of_a_removed_header_fails(plan: Plan) -> None:
    plan = replace(plan, cuda=None, isas=("base",))
    build(plan)
    (plan.sources / "one.h").unlink()
    with pytest.raises(BuildError, match=rf"^{re.escape(Path(plan.compiler).name)} failed: csrc/one.cpp:2:.*one\.h.*"):
        build(plan)


def wrapped(plan: Plan, first: str) -> Plan:
    """With a compiler that does something first."""
    script = plan.sources.parent / "compiler"
    script.write_text(f'#!/bin/sh\ncase "$1" in --version) ;; *) {first};; esac\nexec {plan.compiler} "$@"\n')
    script.chmod(0o755)
    return replace(plan, cuda=None, isas=("base",), compiler=str(script))


def wait_for(path: Path, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path.name} does not come"
        time.sleep(0.01)


def test_a_build_that_hangs_is_stopped_with_its_compilers(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = wrapped(plan, 'echo $$ >> "$(dirname "$0")/pids"; sleep 600')
    pids = plan.sources.parent / "pids"

    class Ninja(subprocess.Popen):  # type: ignore[type-arg]
        def communicate(self, timeout: float) -> tuple[str, str]:  # type: ignore[override]
            if self.args[0] != plan.ninja:  # type: ignore[index]
                return super().communicate()
            wait_for(pids)
            return super().communicate(timeout=0.1)

    monkeypatch.setattr(native_build, "Popen", Ninja)
    with pytest.raises(BuildError, match="ninja was stopped: it took more than 600 s"):
        build(plan)
    deadline = time.monotonic() + 120
    for pid in pids.read_text().split():
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, "a compiler was left at work"
            time.sleep(0.05)


@pytest.mark.parametrize("killed", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_build_leaves_nothing_in_the_way(plan: Plan, killed: signal.Signals) -> None:
    plan = wrapped(plan, "touch ../begun; until [ -e ../go ]; do sleep 0.1; done")
    code = "import sys, pathlib; from pathlib import PosixPath; from kdkernels.ops import native_build\n"
    code += "from kdkernels.ops.native_build import Plan, Torch\n"
    folder = plan.sources.parent
    code += f"native_build.build({plan!r}, {folder / 'build'!r}, {folder / 'out' / 'library.so'!r})"
    process = start(folder, code)
    wait_for(folder / "begun", process)
    process.send_signal(killed)
    process.communicate()
    (folder / "go").touch()  # the ninja that may still be there goes on
    assert process.returncode == -killed
    assert not (folder / "out" / "library.so").exists()
    build(plan)  # beside it
    assert (folder / "out" / "library.so").exists()


def test_without_ninja_at_first_use(tmp_path: Path) -> None:
    compiler()
    reason, output = outcome(start(tmp_path, "import sys; sys.modules['ninja'] = None" + PROBE))
    assert reason.endswith("it cannot be built now: ninja is not installed in this environment: pip install ninja")
    assert "building the native" not in output


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_without_ninja_ahead_of_time(tmp_path: Path, mode: str) -> None:
    compiler()
    source = copy_of_the_checkout(tmp_path)
    code = "import runpy, sys; sys.modules['ninja'] = None; sys.argv = ['', '--name']; runpy.run_path('setup.py')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"KDKERNELS_BUILD_NATIVE": mode},
        cwd=source,
        capture_output=True,
        text=True,
    )
    if mode == "auto":
        assert done.returncode == 0, done.stderr
        assert "building no native kernels ahead of time: ninja is not installed" in done.stdout
    else:
        assert done.returncode != 0
        assert "cannot be built: ninja is not installed in this environment: pip install ninja" in done.stderr


def test_the_real_sources_are_all_compiled() -> None:
    compiler()
    plan = native_build.plan(ROOT / "kdkernels", isas=ISAS, cuda=False)
    made = {output for output, _, _ in plan.calls()}
    sources = {path.stem for path in (ROOT / "csrc").glob("*.cpp")}
    assert {output.partition(".")[0] for output in made - LINK} == sources
