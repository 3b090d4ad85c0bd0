"""One mutant against its tests, in a process of its own: forked off one that has imported torch and not kdkernels."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from .changes import ROOT, Mutant
from .matters import Run, environment, run, sources_of

CACHE = ROOT / "build" / "mutants"
SECONDS, BASELINE_SECONDS = 90, 1800  # of a processor for one trial's tests: a mutant may loop forever
WAITING = 20  # times as long in all, with others at work: it may wait forever too
MEMORY = 16 << 30
# what a change to the text may do to a process that ends it
NOTICED = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGXCPU, signal.SIGALRM, signal.SIGILL}


class Verdict(NamedTuple):
    name: str
    result: str  # killed, survived, no program, same code
    by: str = ""


class BrokenTests(RuntimeError):
    """Tests that say nothing about a mutant."""


def judge(mutant: Mutant) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="kdkernels-mutant-") as folder:
        if not mutant.path.startswith("csrc/"):
            file = Path(folder) / Path(mutant.path).name
            file.write_text(mutant.text)
            return Verdict(mutant.name, *_outcome(run(mutant.path), (mutant.path, file), None))
        result, library = _library(mutant, Path(folder))
        if library is None:
            return Verdict(mutant.name, result)
        return Verdict(mutant.name, *_outcome(run(mutant.path), None, library))


def check_baseline(which: Run) -> None:
    """The tests pass without any mutant, with the library that those of csrc/ are linked from."""
    result, by = _outcome(which, None, CACHE / "base" / "native.so", BASELINE_SECONDS)
    if result != "survived":
        raise BrokenTests(f"tests fail without any mutant: {by}\n{' '.join(which.tests)} -k '{which.words}'")


# ---- csrc/


@cache
def _plan():  # type: ignore[no-untyped-def]
    sys.modules.pop("kdkernels", None)
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("native_build", ROOT / "kdkernels" / "ops" / "native_build.py")
    assert spec is not None
    assert spec.loader is not None
    build = sys.modules["native_build"] = module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.plan(ROOT / "kdkernels", isas=[build.host_isa()], cuda=False)


def _calls() -> dict[str, tuple[str, list[str]]]:
    """By object: its source, and the call that compiles it. Without vectorisation, in half of the time."""
    calls = _plan().calls()[:-1]
    return {o: (Path(inputs[0]).name, ["-O1" if x == "-O3" else x for x in call]) for o, inputs, call in calls}


def prepare() -> None:
    """The objects of csrc/ as it is."""
    folder = CACHE / "base"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    running = [subprocess.Popen(call, cwd=folder, stderr=subprocess.DEVNULL) for _, call in _calls().values()]
    if sum(process.wait() != 0 for process in running):
        raise BrokenTests("csrc/ does not compile")
    _link(folder, [], folder / "native.so")


def _library(mutant: Mutant, folder: Path) -> tuple[str, Path | None]:
    """Compile what the mutant is part of, and link it with the rest."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / mutant.path).write_text(mutant.text)
    changed = []
    for output, (source, call) in _calls().items():
        if source in sources_of(Path(mutant.path).name):
            if subprocess.run(call, cwd=folder, stderr=subprocess.DEVNULL).returncode:
                return "no program", None
            if (folder / output).read_bytes() != (CACHE / "base" / output).read_bytes():
                changed.append(output)
    if not changed:
        return "same code", None
    return "", _link(folder, changed, folder / "native.so")


def _link(folder: Path, changed: Sequence[str], library: Path) -> Path:
    *_, (_, objects, call) = _plan().calls()
    places = {o: str((folder if o in changed else CACHE / "base") / o) for o in objects}
    command = [places.get(x, x) for x in call]
    command[command.index("-o") + 1] = str(library)
    subprocess.run(command, check=True)
    return library


# ---- the tests


Mutated = tuple[str, Path]  # the path of a file of kdkernels, and the file that stands for it


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a mutant's file in place of the package's. A file, as Triton reads the sources of its kernels."""

    def __init__(self, path: str, file: Path) -> None:
        self.module = path.removesuffix(".py").replace("/", ".")
        self.loader = importlib.machinery.SourceFileLoader(self.module, str(file))

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, loader=self.loader)


def _outcome(which: Run, mutant: Mutated | None, library: Path | None, seconds: int = SECONDS) -> tuple[str, str]:
    """survived or killed, and by what."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            _limit(said.fileno(), seconds)
            os._exit(_tests(which, mutant, library))
        _, status = os.waitpid(child, 0)
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) not in NOTICED:
            raise BrokenTests(f"tests ended by signal {os.WTERMSIG(status)}")
        return "killed", signal.Signals(os.WTERMSIG(status)).name
    code = os.WEXITSTATUS(status)
    if code == 5:
        raise BrokenTests(f"no tests in {' '.join(which.tests)} -k '{which.words}'")
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
    return ("killed", (failed or lines or [""])[-1][:150]) if code else ("survived", "")


def _limit(said: int, seconds: int) -> None:
    os.dup2(said, 1)
    os.dup2(said, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(WAITING * seconds)


def _tests(which: Run, mutant: Mutated | None, library: Path | None) -> int:
    import pytest

    environment(which)
    os.chdir(ROOT)
    try:
        imported = [name for name in sys.modules if name.partition(".")[0] == "kdkernels"]
        assert not imported, f"imported before the mutant: {imported}"
        if mutant is not None:
            sys.meta_path.insert(0, _Finder(*mutant))
        if library is not None:
            os.environ["KDKERNELS_TEST_CSRC"] = str(library.parent / "csrc")
            import torch

            from kdkernels.ops import native

            native._find_and_load = lambda: torch.ops.load_library(str(library))  # type: ignore[assignment]
        plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]
        return int(pytest.main([*which.tests, "-x", "-q", "--tb=line", "--no-header", *plugins, "-k", which.words]))
    except BaseException as error:
        print(f"E   {type(error).__name__}: {error}", flush=True)
        return 1
