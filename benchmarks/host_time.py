"""Host time of a step: what Python, torch's dispatcher and a backend take until all kernels are launched. No GPU.

    python -m benchmarks.host_time

Triton's launchers run against a stub driver (tests/stub_driver) that returns at once, the native bindings against the
executor of tests/cuda_on_cpu with its launches held back. CUDA's own part of a launch is in neither. Tensors are on the
CPU, so PyTorch's guard and its caching allocator are not in it either.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from . import launched
from .cases import Case, Provider

SAID = "host time, measured with a stub driver"
STEPS, TURNS = 50, 9


def cases() -> list[Case]:
    """The smallest of each op, and several layers."""
    from .counted import CASES

    wanted = ("kd 64x100", "stkd 64x100", "sp resnet8x4, 3 stages", "cosine 256x512", "at resnet8x4, 3 stages")
    wanted += ("amd resnet8x4, 3 stages", "sp wrn16-2 64x128x8x8", "amd wrn16-2 64x128x8x8")
    return [case for case in CASES if case.name in wanted and case.dtype == torch.float32]


def ways() -> dict[str, Callable[[Case, Any, int], float]]:
    """By backend what times the steps of a case."""
    sys.path.insert(0, str(launched.ROOT / "tests"))
    import stub_driver
    from cuda_on_cpu import library

    from kdkernels.ops import triton_common

    executor = library.install("plain")
    executor.cuda_on_cpu_hold(1)

    def native(case: Case, inputs: Any, steps: int) -> float:
        return timed(Provider(case.ours, case.gradient, "native"), inputs, steps)

    def triton(case: Case, inputs: Any, steps: int) -> float:
        with stub_driver.active(recording=False), launched.launching(triton_common.launch):
            return timed(Provider(case.ours, case.gradient, "triton"), inputs, steps)

    return {"native": native, "triton": triton}


def timed(provider: Provider, inputs: Any, steps: int) -> float:
    """Seconds of a step, by the processor's clock: nothing here waits."""
    provider.step(inputs)
    begin = time.process_time()
    for _ in range(steps):
        provider.step(inputs)
    return (time.process_time() - begin) / steps


def main() -> None:
    torch.set_num_threads(1)
    of = ways()
    print(f"| step, us: {SAID} | {' | '.join(of)} |\n|---|{'---:|' * len(of)}")
    for case in cases():
        inputs = case.inputs()
        found: dict[str, list[float]] = {name: [] for name in of}
        for _ in range(TURNS):  # in turns, as other work on the machine slows both
            for name, way in of.items():
                found[name].append(way(case, inputs, STEPS))
        print(f"| {case.label} | {' | '.join(f'{1e6 * statistics.median(x):.0f}' for x in found.values())} |")


if __name__ == "__main__":
    main()
