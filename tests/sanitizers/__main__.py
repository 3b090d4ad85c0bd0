"""csrc/ for CPUs under the sanitizers of the C++ compiler: fails if one of them says anything.

python tests/sanitizers [address] [threads]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from kdkernels.ops import native_build  # noqa: E402

OPS = ["tests/ops", "tests/test_edges.py", "tests/properties"]
# what is compiled by Inductor is not csrc/; of tests without a backend's name in them, none is of native kernels alone
WORDS = "native and not compil and not opcheck"


def address() -> None:
    """The op and property tests of the native backend with AddressSanitizer and UndefinedBehaviorSanitizer.

    Leaks are not looked for: Python and torch keep much until a process ends.
    """
    compiler = native_build.find_compiler()
    # libstdc++ too: the sanitizer looks for what it wraps, here a throw, when it is loaded
    preloaded = [_runtime(compiler, name) for name in ("libasan.so", "libstdc++.so")]
    environment = os.environ | {
        "CXX": str(HERE / "compiler"),
        "SANITIZED_CXX": compiler,
        "LD_PRELOAD": ":".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "KDKERNELS_BACKEND": "native",  # or it is an error
        "KDKERNELS_PROPERTIES": "10",
    }
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys"]  # sanitizers write to file 2
    pytest = [sys.executable, "-m", "pytest", *options, *OPS, "-k", WORDS, "--hypothesis-seed=19"]
    subprocess.run(pytest, env=environment, cwd=ROOT, check=True)


def _runtime(compiler: str, name: str) -> str:
    said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return str(Path(said.strip()).resolve())


def threads() -> None:
    """threads.cpp and the kernels with ThreadSanitizer."""
    folder = ROOT / "build" / "sanitizers"
    folder.mkdir(parents=True, exist_ok=True)
    isa = native_build.host_isa()
    sources = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.name != "bindings.cpp"]
    flags = [*native_build.CXX_FLAGS, *native_build.KERNEL_FLAGS, *native_build.ISA_FLAGS[isa], f"-DKD_ISA={isa}"]
    flags += ["-O1", "-g1", "-w", "-fsanitize=thread", f"-I{ROOT / 'csrc'}", "-pthread"]
    program = folder / "threads"
    sources = [HERE / "threads.cpp", *sources]
    subprocess.run([native_build.find_compiler(), *flags, *map(str, sources), "-o", str(program)], check=True)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    if subprocess.run([str(program), "race"], env=environment, capture_output=True).returncode == 0:
        raise SystemExit("ThreadSanitizer does not see a race that is there")
    subprocess.run([str(program)], env=environment, check=True)


if __name__ == "__main__":
    for run in [{"address": address, "threads": threads}[name] for name in sys.argv[1:] or ("address", "threads")]:
        run()
