"""What the GPU kernels cost by count: machine code for sm_90 and the launches of the speed report's cases. No GPU.

    python -m benchmarks.counted                  everything: results/counted-sm90.md
    python -m benchmarks.counted --only amd       the cases whose label contains a word

Counted, not measured: no line of it was timed. A launch takes as long as the slowest of memory, L2, tensor cores,
issue slots, special-function units and so on, all of them busy all the time, and 3 us: a bound from below.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from kdkernels.ops import native_build

from . import bench_angular_margin, bench_energy, bench_gram, bench_softmax_kl, launched
from .cases import Case
from .launched import Work
from .sass import Kernel, Loop, kernels, occupancy

CASES: list[Case] = [
    *bench_softmax_kl.CASES,
    *bench_gram.CASES,
    *bench_energy.CASES,
    *bench_angular_margin.CASES,
]
# An H100 SXM at the clock that it holds under load; bytes and clocks per second.
MULTIPROCESSORS, CLOCK = 132, 1.7e9
MEMORY, L2, L2_SIZE = 3.0e12, 5.5e12, 40 << 20
LAUNCH = 3e-6
SAID = "counted, not measured"


class Launch(NamedTuple):
    """One launch with its machine code, and the seconds it needs of each resource."""

    work: Work
    kernel: Kernel
    threads: int
    shared: int
    loops: list[Loop]
    seconds: dict[str, float]

    @property
    def traffic(self) -> float:
        return self.seconds["memory"] * MEMORY

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda unit: self.seconds[unit])

    @property
    def main_loop(self) -> Loop:
        """Where most issue slots go."""
        return max(self.loops, key=lambda loop: loop.clocks["issue slots"])

    @property
    def occupancy(self) -> float:
        return occupancy(self.kernel.registers, self.threads, self.shared)


def launch(work: Work, kernel: Kernel, threads: int, shared: int) -> Launch:
    loops = kernel.executed(work.bytes_at, work.blocks * -(-threads // 32))
    clocks: dict[str, float] = {"loads": work.bank_conflicts}
    for loop in loops:
        for unit, n in loop.clocks.items():
            clocks[unit] = clocks.get(unit, 0.0) + n
    busy = min(MULTIPROCESSORS, work.blocks)
    resident = min(work.blocks, MULTIPROCESSORS * occupancy(kernel.registers, threads, shared) * 2048 / threads)
    again = work.requested - work.once if work.once / work.blocks * resident > L2_SIZE else 0.0  # no longer in L2
    seconds = {unit: n / busy / CLOCK for unit, n in clocks.items()}
    seconds["memory"] = (min(work.distinct, work.once) + again) / MEMORY
    seconds["L2"] = work.requested / L2
    return Launch(work, kernel, threads, shared, loops, seconds)


# ---- what nvcc makes of csrc


def cubins(folder: Path) -> list[Path]:
    """csrc/*.cu for sm_90, with the flags of the package's own build."""
    cuda = native_build.find_cuda()
    if cuda is None:
        raise SystemExit("no nvcc: the native kernels cannot be counted here")
    made = []
    for source in sorted((launched.ROOT / "csrc").glob("*.cu")):
        made.append(folder / f"{source.stem}.cubin")
        command = [
            f"{cuda}/bin/nvcc",
            *native_build.NVCC_FLAGS,
            "-cubin",
            "-arch=sm_90",
            str(source),
            "-o",
            str(made[-1]),
        ]
        subprocess.run(command, check=True)
    return made


def of_native(cases: list[Case]) -> list[list[Launch]]:
    with tempfile.TemporaryDirectory() as folder:
        compiled = [kernel for path in cubins(Path(folder)) for kernel in kernels(path).values()]
    works = launched.native(cases)
    from cuda_on_cpu.library import plain_name  # on the path by now

    names = subprocess.run(["c++filt"], input="\n".join(k.name for k in compiled), capture_output=True, text=True)
    by_name: dict[str, list[Kernel]] = {}
    for kernel, name in zip(compiled, names.stdout.splitlines(), strict=True):
        by_name.setdefault(plain_name(name), []).append(kernel)

    def found(work: Work) -> Launch:
        kernel = max(by_name[work.kernel], key=lambda k: k.matched(work.bytes_at))
        return launch(work, kernel, work.threads, kernel.usage["SHARED"] + work.dynamic_shared)

    return [[found(work) for work in of_case] for of_case in works]


# ---- what Triton makes of its kernels


def of_triton(cases: list[Case], only: str) -> list[list[Launch]]:
    command = [sys.executable, "-m", "benchmarks.counted", "--interpreted", "--only", only]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    works = [[_work(x) for x in of_case] for of_case in json.loads(said)]
    found = []
    for case, of_case in zip(cases, works, strict=True):
        compiled = _compile(case)
        found.append([launch(w, *c) for w, c in zip(of_case, compiled, strict=True)])
    return found


def _work(values: list[Any]) -> Work:
    *rest, places = values
    return Work(*rest, {tuple(place): n for place, n in places})


def _compile(case: Case) -> list[tuple[Kernel, int, int]]:
    """Kernel, threads, shared memory of the launches of a case."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Hopper:
        """A driver that knows its target and nothing else."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return -1

        def get_current_stream(self, device: int) -> int:
            return 0

    found: list[tuple[Kernel, int, int]] = []

    def compile_one(kernel: Any, programs: int, device: Any, *args: Any, **options: Any) -> None:
        if programs:
            made = kernel.warmup(*args, grid=(programs,), **options)
            found.append((_disassembled(made.asm["cubin"]), 32 * made.metadata.num_warps, made.metadata.shared))

    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(Hopper())
    try:
        with launched.launching(compile_one):
            launched.step(case, "triton")
    finally:
        vars(triton.runtime.driver).update(before)
    return found


@cache
def _disassembled(cubin: bytes) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (kernel,) = kernels(Path(file.name)).values()
    return kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose label contains this")
    parser.add_argument("--backend", choices=["native", "triton"], action="append", help="default: both")
    parser.add_argument("--output", type=Path, default=launched.ROOT / "benchmarks" / "results" / "counted-sm90.md")
    parser.add_argument("--interpreted", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.label]
    if not cases:
        parser.error(f"no case contains {options.only!r}")
    if options.interpreted:
        print(json.dumps([[[*w[:-1], list(w.bytes_at.items())] for w in ws] for ws in launched.interpreted(cases)]))
        return
    ways: dict[str, Callable[[], list[list[Launch]]]] = {
        "native": lambda: of_native(cases),
        "triton": lambda: of_triton(cases, options.only),
    }
    from .render_counted import report

    found = {name: way() for name, way in ways.items() if name in (options.backend or ways)}
    options.output.write_text(report(cases, found))
    print(options.output)


if __name__ == "__main__":
    main()
