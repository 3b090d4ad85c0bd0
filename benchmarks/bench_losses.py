"""Forward and backward of whole losses against the published formulas.

Run as a file, all providers of a row take turns in one process, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels
from benchmarks import published

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[], Any]


def logits(n: int, c: int) -> dict[str, Step]:
    s, t = torch.randn(n, c, device=DEVICE, requires_grad=True), torch.randn(n, c, device=DEVICE)
    labels = (
        torch.randint(c, (n,), device=DEVICE),
        torch.randint(c, (n,), device=DEVICE),
        torch.tensor(0.3, device=DEVICE),
    )
    return providers(lambda: published.stkd(s, t, *labels), lambda: kdkernels.stkd_loss(s, t, *labels), s)


def maps(loss: str, *shape: int) -> dict[str, Step]:
    s, t = torch.randn(shape, device=DEVICE).relu().requires_grad_(), torch.randn(shape, device=DEVICE).relu()
    ours = {"sp": kdkernels.sp_loss, "amd": kdkernels.amd_loss}[loss]
    return providers(lambda: getattr(published, loss)(s, t), lambda: ours(s, t), s)


def providers(theirs: Callable[[], Tensor], ours: Callable[[], Tensor], leaf: Tensor) -> dict[str, Step]:
    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            leaf.grad = None
            loss().backward()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return run

    torch.testing.assert_close(ours(), theirs().view(()), rtol=1e-3, atol=1e-6)  # the same number before it is timed
    return {"eager": step(theirs), "kdkernels": step(ours)}


ROWS: dict[str, Callable[[], dict[str, Step]]] = {
    "KD + mixed CE 256x1000": lambda: logits(256, 1000),
    "SP 64x64x32x32": lambda: maps("sp", 64, 64, 32, 32),
    "AMD 64x256x8x8": lambda: maps("amd", 64, 256, 8, 8),
}


@pytest.mark.parametrize("provider", ["eager", "kdkernels"])
@pytest.mark.parametrize("row", list(ROWS))
def test_step(benchmark: Any, row: str, provider: str) -> None:
    benchmark.group = row
    benchmark(ROWS[row]()[provider])


def compare(steps: dict[str, Step], rounds: int = 100) -> dict[str, float]:
    """Median milliseconds per provider, alternating."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 5):
        for name, run in steps.items():
            begin = time.perf_counter()
            run()
            if i >= 5:  # the first are warm-up
                times[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    torch.set_num_threads(2)
    for name, make in ROWS.items():
        medians = compare(make())
        columns = "   ".join(f"{provider} {ms:8.3f} ms" for provider, ms in medians.items())
        print(f"{name:26s} {columns}   ratio {medians['eager'] / medians['kdkernels']:.2f}")


if __name__ == "__main__":
    main()
