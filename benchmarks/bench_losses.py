"""Whole losses, forward + backward, fp32: each backend against the published formula, eager and compiled.

    pytest benchmarks
    python benchmarks/bench_losses.py [--rounds 30] [--no-compile] [--only sp] [--threads 1 --cpu-time]

Run as a program, the candidates take turns in one process, so that a noisy machine is noisy for all of them; printed
are medians and the ratios to the first one: above 1, the first is faster. Values are compared before they are timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import kdkernels
from benchmarks import published
from kdkernels.ops import backend as backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Candidate = Callable[[], object]


def step(loss: Callable[..., Tensor], student: Tensor, *constants: Tensor) -> Candidate:
    def run() -> None:
        student.grad = None
        loss(student, *constants).sum().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def measure(
    candidates: dict[str, Candidate], rounds: int, clock: Callable[[], float], quantile: float
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
        candidate()
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = clock()
            candidate()
            times[name].append(clock() - start)
    return {name: sorted(values)[round(quantile * (rounds - 1))] for name, values in times.items()}


def on(backend: str, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Tensor) -> Tensor:
        with kdkernels.use_backend(backend):
            return loss(*args)

    return run


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...]]] = {
    "stkd 256x1000": (kdkernels.stkd_loss, published.stkd, (256, 1000)),
    "stkd 1024x1000": (kdkernels.stkd_loss, published.stkd, (1024, 1000)),
    "sp 64x64x32x32": (kdkernels.sp_loss, published.sp, (64, 64, 32, 32)),
    "sp 128x256x8x8": (kdkernels.sp_loss, published.sp, (128, 256, 8, 8)),
    "amd 64x64x32x32": (kdkernels.amd_loss, published.amd, (64, 64, 32, 32)),
    "amd 64x256x8x8": (kdkernels.amd_loss, published.amd, (64, 256, 8, 8)),
    "mlkd correlation B=64 V=4 d=512": (kdkernels.correlation_loss, published.correlation, (256, 512)),
}


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """(student, constants...): maps behind a ReLU, or logits, with two labels per row where they have 1000 classes."""
    torch.manual_seed(0)
    pair = [2 * torch.randn(shape, device=DEVICE) for _ in range(2)]
    if len(shape) == 4:
        pair = [x.relu() for x in pair]
    labels = []
    if shape[-1] == 1000:
        labels = [torch.randint(1000, shape[:1], device=DEVICE) for _ in range(2)] + [torch.tensor(0.3, device=DEVICE)]
    return pair[0].requires_grad_(), pair[1], *labels


def candidates(name: str, compiled: bool = True) -> dict[str, Candidate]:
    """Our backends that run here, fastest first, then the published formula."""
    ours, theirs, shape = CASES[name]
    student, *constants = inputs(shape)
    torch.testing.assert_close(ours(student, *constants), theirs(student, *constants).view(()), rtol=1e-3, atol=1e-6)
    found = {
        b: step(on(b, ours), student, *constants)
        for b in backends.BACKENDS
        if all(backends.why_not(op, b, student) is None for op in backends.OPS)
    }
    found["eager"] = step(theirs, student, *constants)
    if compiled:
        torch._dynamo.reset()
        found["compile"] = step(torch.compile(theirs), student, *constants)
    if name.startswith("sp"):
        found["3 mm"] = matrix_products(student, constants[0])
    return found


@pytest.mark.parametrize("candidate", ["native", "triton", "reference", "eager", "compile"])
@pytest.mark.parametrize("name", list(CASES))
def test_step(benchmark: Any, name: str, candidate: str) -> None:
    benchmark.group = name
    run = candidates(name, candidate == "compile").get(candidate)
    if run is None:
        pytest.skip(f"{candidate} does not run on {DEVICE} here")
    run()
    benchmark(run)


def matrix_products(student: Tensor, teacher: Tensor) -> Candidate:
    """What any SP has to compute if every product is a plain one: two Gram matrices and W Q."""
    s, t = student.detach().flatten(1), teacher.flatten(1)
    w = torch.randn(len(s), len(s))
    return lambda: (s @ s.t(), t @ t.t(), w @ s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantile", type=float, default=0.5, help="of the rounds' times; 0 is the best")
    parser.add_argument("--cpu-time", action="store_true", help="processor time: for a machine that others use too")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    for name in CASES:
        if options.only not in name:
            continue
        rounds = min(options.rounds, 8) if "mlkd" in name else options.rounds
        result = measure(candidates(name, not options.no_compile), rounds, clock, options.quantile)
        first = next(iter(result))
        ratios = "  ".join(f"{k} {v / result[first]:.2f}x" for k, v in result.items() if k != first)
        print(f"{name:32} {first} {result[first] * 1e3:8.3f} ms   {ratios}", flush=True)


if __name__ == "__main__":
    main()
