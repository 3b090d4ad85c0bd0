"""What the GPU kernels cost by count: machine code for sm_90 and the launches of the speed report's cases. No GPU.

    python -m benchmarks.counted                  everything: results/counted-sm90.md
    python -m benchmarks.counted --only gram      native alone, to the screen: an op, or cases whose label has this

Counted, not measured: no line of it was timed. A launch takes as long as the slowest of memory, L2, tensor cores,
issue slots, special-function units and so on, all of them busy all the time, then as long as the last of several
blocks works on alone, and 3 us: a bound from below.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize

import kdkernels
from kdkernels.ops import native_build

from . import bench_angular_margin, bench_energy, bench_gram, bench_softmax_kl, launched, published
from .bench_gram import BF16, RESNET8X4
from .cases import Case, Inputs, feature_case
from .instructions import UNITS, Loop
from .launched import Work
from .sass import Kernel, kernels


def cosines(rows: int, width: int, dtype: torch.dtype) -> Case:
    """cosine_similarity. Floor: read both, write the cosines; read those, their gradient and the rows, write one's."""

    def inputs() -> Inputs:
        x, y = (torch.randn(rows, width).to(dtype) for _ in range(2))
        return [x.requires_grad_()], [y]

    return Case(
        group="gram",
        name=f"cosine {rows}x{width}",
        ours=lambda x, y: kdkernels.cosine_similarity(x, y).sum(),
        published=lambda x, y: (normalize(x) @ normalize(y).T).sum(),
        inputs=inputs,
        bytes=5 * rows * width * dtype.itemsize + 3 * rows * rows * 4,
        gain="algebra",
        dtype=dtype,
    )


LARGE = ("resnet50", (256, 2048, 7, 7))
stages = partial(feature_case, students=RESNET8X4)
CASES: list[Case] = [
    *bench_softmax_kl.CASES,
    bench_softmax_kl.case("kd", 8192, 32000, BF16),
    *bench_gram.CASES,
    stages("gram", "sp resnet8x4, 3 stages", ours=kdkernels.sp_loss, published_loss=published.sp),
    *(cosines(256, 512, dtype) for dtype in (torch.float32, BF16)),
    *bench_energy.CASES,
    bench_energy.case(*LARGE, dtype=BF16),
    *bench_angular_margin.CASES,
    bench_angular_margin.case(*LARGE, dtype=BF16),
    stages("angular_margin", "amd resnet8x4, 3 stages", ours=kdkernels.amd_loss, published_loss=published.amd),
]
# An H100 SXM at the clock that it holds under load; bytes and clocks per second.
MULTIPROCESSORS, CLOCK = 132, 1.7e9
MEMORY, L2, L2_SIZE = 3.0e12, 5.5e12, 40 << 20
PER_CLOCK = 64  # bytes from L2 to one multiprocessor
LAUNCH = 3e-6
SAID = "counted, not measured"
REPORT = launched.ROOT / "benchmarks" / "results" / "counted-sm90.md"


class Launch(NamedTuple):
    """One launch with its machine code, and the seconds it needs of each resource."""

    work: Work
    kernel: Kernel
    threads: int
    shared: int
    loops: list[Loop]
    seconds: dict[str, float]
    alone: float  # the last of several blocks

    @property
    def time(self) -> float:
        return max(self.seconds.values()) + self.alone

    @property
    def traffic(self) -> float:
        return self.seconds["memory"] * MEMORY

    @property
    def bound(self) -> str:
        slowest = max(self.seconds, key=lambda unit: self.seconds[unit])
        return slowest if self.seconds[slowest] >= self.alone else "last block"

    @property
    def main_loops(self) -> list[Loop]:
        """Where the issue slots go, a sixth of them at least: most of them first."""
        by_slots = sorted(self.loops, key=lambda loop: -loop.clocks["issue slots"])
        total = sum(loop.clocks["issue slots"] for loop in self.loops)
        return [loop for loop in by_slots if loop.clocks["issue slots"] >= total / 6 or loop is by_slots[0]]

    @property
    def occupancy(self) -> float:
        return occupancy(self.kernel.registers, self.threads, self.shared)


def occupancy(registers: int, threads: int, shared: int) -> float:
    """Share of a multiprocessor's 64 warps that can be resident, sm_90."""
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = 227 * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def launch(work: Work, kernel: Kernel, threads: int, shared: int) -> Launch:
    loops = kernel.executed(work.bytes_at, work.blocks * -(-threads // 32))
    clocks = total_clocks(loops)
    clocks["loads"] += work.bank_conflicts
    busy = min(MULTIPROCESSORS, work.blocks)
    resident = min(work.blocks, MULTIPROCESSORS * occupancy(kernel.registers, threads, shared) * 2048 / threads)
    again = work.requested - work.once if work.once / work.blocks * resident > L2_SIZE else 0.0  # no longer in L2
    seconds = {unit: n / busy / CLOCK for unit, n in clocks.items()}
    seconds["memory"] = (min(work.distinct, work.once) + again) / MEMORY
    seconds["L2"] = work.requested / min(L2, busy * PER_CLOCK * CLOCK)
    return Launch(work, kernel, threads, shared, loops, seconds, alone(work, kernel, threads))


def total_clocks(loops: list[Loop]) -> dict[str, float]:
    return {unit: sum(loop.clocks[unit] for loop in loops) for unit in UNITS}


def alone(work: Work, kernel: Kernel, threads: int) -> float:
    """Seconds that the last of several blocks takes after all the others."""
    if work.last is None:
        return 0.0
    clocks = total_clocks(kernel.executed(work.last.bytes_at, -(-threads // 32)))
    return max(work.last.requested / PER_CLOCK, *clocks.values()) / CLOCK


# ---- what nvcc makes of csrc


def cubins(names: Collection[str]) -> list[Path]:
    """Those of csrc/*.cu that name one of the kernels, for sm_90, with the flags of the package's own build."""
    from cuda_on_cpu import build  # on the path by now

    cuda = native_build.find_cuda()
    if cuda is None:
        raise SystemExit("no nvcc: the native kernels cannot be counted here")
    command = [f"{cuda}/bin/nvcc", *native_build.NVCC_FLAGS, "-cubin", "-arch=sm_90"]
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    files, made = build.csrc(), []
    for name, text in files.items():
        parts = [text, *build.included(text, files).values()]
        if not name.endswith(".cu") or not any(re.search(rf"\b({'|'.join(names)})\b", part) for part in parts):
            continue

        def make(output: Path, source: Path = build.CSRC / name) -> None:
            subprocess.run([*command, str(source), "-o", str(output)], check=True)

        cubin = launched.ROOT / "build" / "counted" / f"{name}-{build.digest(*parts, *command, version)}.cubin"
        made.append(build.appear(cubin, make))
    return made


def of_native(cases: list[Case]) -> list[list[Launch]]:
    works = launched.native(cases)
    from cuda_on_cpu.library import plain_name  # on the path by now

    ran = {re.split("[<(]", work.kernel)[0] for of_case in works for work in of_case}
    wanted = re.compile("|".join(f"{len(name)}{name}(?=[IE])" for name in ran))  # as mangled
    paths = cubins(ran)
    compiled = [k for path in paths for k in kernels(path, lambda name: bool(wanted.search(name))).values()]
    names = subprocess.run(["c++filt"], input="\n".join(k.name for k in compiled), capture_output=True, text=True)
    by_name: dict[str, list[Kernel]] = {}
    for kernel, name in zip(compiled, names.stdout.splitlines(), strict=True):
        by_name.setdefault(plain_name(name), []).append(kernel)

    def found(work: Work) -> Launch:
        if work.kernel not in by_name:
            raise SystemExit(f"{work.kernel} ran and is not in the machine code, which has {sorted(by_name)}")
        kernel = max(by_name[work.kernel], key=lambda k: k.matched(work.bytes_at))
        return launch(work, kernel, work.threads, kernel.usage["SHARED"] + work.dynamic_shared)

    return [[found(work) for work in of_case] for of_case in works]


# ---- what Triton makes of its kernels


def of_triton(cases: list[Case]) -> list[list[Launch]]:
    command = [sys.executable, "-m", "benchmarks.launched", *(case.label for case in cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    works: list[list[Work]] = pickle.loads(said)
    found = []
    for case, of_case in zip(cases, works, strict=True):
        compiled = _compile(case)
        found.append([launch(w, *c) for w, c in zip(of_case, compiled, strict=True)])
    return found


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


WAYS: dict[str, Callable[[list[Case]], list[list[Launch]]]] = {"native": of_native, "triton": of_triton}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases of this op, or whose label contains this: to the screen")
    parser.add_argument("--backend", choices=list(WAYS), action="append", help="default: both; of some native")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only == case.group] or [c for c in CASES if options.only in c.label]
    if not cases:
        parser.error(f"{options.only!r} is no op and in no case's label: {', '.join(c.label for c in CASES)}")
    from .render_counted import report, text

    names = options.backend or (["native"] if options.only else list(WAYS))
    found = {name: WAYS[name](cases) for name in names}
    if options.only:
        print("\n".join(text(case, name, of[i]) for i, case in enumerate(cases) for name, of in found.items()))
    else:
        REPORT.write_text(report(cases, found))
        print(REPORT)


if __name__ == "__main__":
    main()
