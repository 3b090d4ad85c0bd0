"""Host time of a step: what Python, torch's dispatcher and a backend take until all kernels are launched. No GPU.

    python -m benchmarks.host_time

Triton's launchers run against a stub driver (tests/stub_driver) that returns at once, the native bindings against the
executor of tests/cuda_on_cpu with its launches held back: CUDA's own part of a launch is in neither. Tensors are on the
CPU, so PyTorch's device guard and its caching allocator are not in it either.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import torch

from kdkernels.ops import backend

from . import launched
from .cases import Case, Inputs, Provider
from .counted import CASES

SAID = "host time, measured with a stub driver"
LABELS = (
    "kd 64x100",
    "stkd 64x100",
    "sp wrn16-2 64x128x8x8",
    "sp resnet8x4, 3 stages",
    "cosine 256x512",
    "at resnet8x4, 3 stages",
    "amd wrn16-2 64x128x8x8",
    "amd resnet8x4, 3 stages",
)
STEPS, TURNS = 40, 9


class Timed:
    """A backend's implementation of an op that adds up how long its functions take."""

    seconds = 0.0

    def __init__(self, implementation: Any) -> None:
        self._implementation = implementation

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._implementation, name)

        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args)
            Timed.seconds += time.perf_counter() - begin
            return result

        setattr(self, name, function if name == "supports" else timed)
        return getattr(self, name)


def steps(provider: Provider, inputs: Inputs) -> tuple[float, float]:
    """Seconds of a step, and of those what the backend's functions take: medians."""
    provider.step(inputs)
    whole, own = [], []
    for _ in range(STEPS):
        Timed.seconds, begin = 0.0, time.perf_counter()
        provider.step(inputs)
        whole.append(time.perf_counter() - begin)
        own.append(Timed.seconds)
    return median(whole), median(own)


def ways() -> dict[str, Callable[[Case, Inputs], tuple[float, float]]]:
    sys.path.insert(0, str(launched.ROOT / "tests"))
    import stub_driver
    from cuda_on_cpu import library

    from kdkernels.ops import triton_common

    executor = library.install("plain")
    executor.cuda_on_cpu_hold(1)
    load = backend.load
    backend.load = cache(lambda op, name: Timed(load(op, name)))

    def native(case: Case, inputs: Inputs) -> tuple[float, float]:
        return steps(Provider(case.ours, case.gradient, "native"), inputs)

    def triton(case: Case, inputs: Inputs) -> tuple[float, float]:
        with stub_driver.active(recording=False), launched.launching(triton_common.launch):
            return steps(Provider(case.ours, case.gradient, "triton"), inputs)

    return {"native": native, "triton": triton}


def main() -> None:
    torch.set_num_threads(1)
    of = ways()
    columns = [f"{name}{part}" for name in of for part in ("", "'s own part")]
    print(f"| a step, us: {SAID} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for case in (case for case in CASES if case.name in LABELS and case.dtype == torch.float32):
        inputs = case.inputs()
        turns = [
            [way(case, inputs) for way in of.values()] for _ in range(TURNS)
        ]  # other work on the machine slows both
        found = [min(turn[i][part] for turn in turns) for i in range(len(of)) for part in (0, 1)]
        print(f"| {case.label} | {' | '.join(f'{1e6 * seconds:.0f}' for seconds in found)} |", flush=True)


if __name__ == "__main__":
    main()
