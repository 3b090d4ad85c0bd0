"""How far losses and gradients are from their definitions in fp64: ``python -m benchmarks.accuracy`` writes the tables
of docs/numbers.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

import kdkernels

from .accuracy_cases import AccuracyCase, cases, inputs, logit_cases
from .accuracy_tables import PAGE, write
from .definitions import by_definition

UPSTREAM = 1.7


class Off(NamedTuple):
    """Relative: of the loss, and of the gradient's norm."""

    loss: float
    gradient: float


class Result(NamedTuple):
    loss: Tensor
    gradients: list[Tensor]


def step(case: AccuracyCase, student: list[Tensor], teacher: list[Tensor], dtype: torch.dtype) -> Result:
    leaves = [x.to(dtype).requires_grad_() for x in student]
    loss = case.loss(leaves, [x.to(dtype) for x in teacher])
    upstream = torch.full((), UPSTREAM, dtype=loss.dtype)
    return Result(loss.detach().double(), [g.double() for g in torch.autograd.grad(loss, leaves, upstream)])


def truth(case: AccuracyCase, student: list[Tensor], teacher: list[Tensor]) -> Result:
    with by_definition():
        return step(case, student, teacher, torch.float64)


def off(actual: Result, expected: Result, dtype: torch.dtype = torch.float32) -> Off:
    """In half precision what is left beside one rounding of the gradient."""
    square, size = 0.0, 0.0
    for a, e in zip(actual.gradients, expected.gradients, strict=True):
        rounding = e.to(dtype).double() - e if dtype.itemsize == 2 else torch.zeros_like(e)
        square += float(((a - e).norm() - rounding.norm()).clamp(min=0) ** 2)
        size += float(e.norm() ** 2)
    loss = abs(float(actual.loss - expected.loss)) / max(abs(float(expected.loss)), 1e-300)
    return Off(loss, (square / max(size, 1e-300)) ** 0.5)


def conditioning(case: AccuracyCase, student: list[Tensor], teacher: list[Tensor], expected: Result) -> Off:
    """What one ulp of the student's fp32 numbers, up or down, changes: the larger of three draws."""
    changes = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        moved = []
        for x in student:
            up = torch.rand(x.shape, generator=generator) < 0.5
            infinity = torch.full_like(x, torch.inf, dtype=torch.float32)
            moved.append(x.float().nextafter(torch.where(up, infinity, -infinity)).where(x != 0, 0).double())
        changes.append(off(truth(case, moved, teacher), expected))
    return Off(*(max(c[i] for c in changes) for i in range(2)))


class State(NamedTuple):
    """How a student lies to its teacher."""

    title: str
    noise: float | None = None  # relative, of a student that is its teacher plus noise
    temperature: float | None = None  # None: the losses' usual ones
    dtype: torch.dtype = torch.float32

    def cases(self) -> list[AccuracyCase]:
        return cases() if self.temperature is None else logit_cases(self.temperature)


STATES = [
    State("Student and teacher independent"),
    *(State(f"Noise of {noise:g}", noise) for noise in (1e-1, 1e-2, 1e-3, 1e-4)),
    *(State(f"T = {t}, independent", None, float(t)) for t in (20, 1000)),
    *(State(f"T = {t}, noise of 0.01", 0.01, float(t)) for t in (20, 1000)),
    State("bfloat16", dtype=torch.bfloat16),
    State("float16", dtype=torch.float16),
]
ONE_ULP = "one ulp"
Errors = dict[str, Off]  # by backend, and of one ulp of the inputs


def measure(case: AccuracyCase, state: State, backends: Sequence[str], ulp: bool = True) -> Errors:
    student, teacher = inputs(case, state.noise, state.dtype)
    expected = truth(case, student, teacher)
    found = {ONE_ULP: conditioning(case, student, teacher, expected)} if ulp else {}
    for name in backends:
        with kdkernels.use_backend(name), suppress(kdkernels.BackendError):  # which has no kernels for that op
            found[name] = off(step(case, student, teacher, state.dtype), expected, state.dtype)
    return found


def measure_all(backends: Sequence[str], ulp: bool) -> dict[str, dict[str, Errors]]:
    torch.set_num_threads(1)
    return {s.title: {case.name: measure(case, s, backends, ulp) for case in s.cases()} for s in STATES}


def interpreted() -> dict[str, dict[str, dict[str, list[float]]]]:
    """What Triton's interpreter finds, which has to be chosen before the kernels are imported."""
    command = [sys.executable, "-m", "benchmarks.accuracy", "--interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    if sys.argv[1:] == ["--interpreted"]:
        print(json.dumps(measure_all(["triton"], ulp=False)))
        return
    found = measure_all(["native", "reference"], ulp=True)
    for title, losses in interpreted().items():
        for name, errors in losses.items():
            found[title][name].update({backend: Off(*e) for backend, e in errors.items()})
    write(PAGE, found)


if __name__ == "__main__":
    main()
