"""How far losses and gradients are from their definitions in fp64: ``python -m benchmarks.accuracy``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import kdkernels

from .accuracy_cases import AccuracyCase, cases, inputs, logit_cases
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


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    backend_names = sys.argv[1].split(",")
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    for title, kind in (("usual", cases()), ("T=20", logit_cases(20.0)), ("T=1000", logit_cases(1000.0))):
        for case in kind:
            if wanted not in case.name:
                continue
            for noise in (None, 1e-1, 1e-2, 1e-3, 1e-4):
                s, t = inputs(case, noise)
                expected = truth(case, s, t)
                c = conditioning(case, s, t, expected)
                line = f"{title:7s}{case.name:26s}{noise!s:8s} one ulp {c.loss:8.1e} {c.gradient:8.1e}"
                for b in backend_names:
                    with kdkernels.use_backend(b):
                        try:
                            e = off(step(case, s, t, torch.float32), expected)
                        except kdkernels.BackendError:
                            continue
                    flag = "".join("!" if x > 1e-5 and x > 2 * y else "." for x, y in zip(e, c))
                    line += f"   {b} {e.loss:8.1e} {e.gradient:8.1e} {flag}"
                print(line)
