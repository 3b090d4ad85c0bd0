"""What the property tests draw: tensors of odd shapes, values and strides, labels, schedules.

Values come from a drawn seed and a few drawn words about them, as numbers drawn one by one would take most of the time;
shapes, words and places of special values are what a failing case shrinks in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from checking import DEVICE, DTYPES, backends_under_test
from hypothesis import strategies as st
from torch import Tensor

# Triton's kernels have no float64, and every program that the interpreter or the executor runs is slow
SLOW = backends_under_test()[0] == "triton" or backends_under_test() == ["native"]
FLOATS = [d for d in DTYPES if d != torch.float64 or backends_under_test() != ["triton"]]
SIZES = (0, 1, 2, 3, 5, 7, 11, 13, 17, 31) if SLOW else (0, 1, 2, 3, 5, 7, 13, 31, 61, 127, 257)
SMALL = (0, 1, 2, 3, 5, 7)
EXPONENTS = (0, 0, 0, 0, -1, 1, 2, 4, -4, -8, 8, -12, 12, -20, 20, -30, 30)
SPECIAL = (-0.0, math.nan, math.inf, -math.inf)
KINDS = ("normal", "normal", "normal", "positive", "sparse", "constant", "repeated", "wide", "offset", "zero")
RELATIONS = ("independent", "independent", "independent", "equal", "close", "closer", "opposite", "scaled")
LAYOUTS = ("contiguous", "contiguous", "transposed", "offset", "sliced", "expanded", "size one", "channels last")

dtypes = st.sampled_from(FLOATS)
sizes, small = st.sampled_from(SIZES), st.sampled_from(SMALL)
seeds = st.integers(0, 2**16)
temperatures = st.sampled_from([1.0, 4.0, 0.5, 2.5, 0.07, 20.0])
reductions = st.sampled_from(["mean", "sum", "none"])


def exponents(most: int = 30) -> st.SearchStrategy[int]:
    """Of the magnitudes; the ordinary ones more often."""
    return st.sampled_from([e for e in EXPONENTS if abs(e) <= most])


def _filled(shape: Sequence[int], kind: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "positive":
        return x.relu()
    if kind == "sparse":
        return x * (torch.rand(*shape, generator=generator) < 0.2)
    if kind == "constant":
        return torch.ones_like(x)
    if kind == "zero":
        return torch.zeros_like(x)
    if kind == "repeated" and shape[0] > 1:
        return x[torch.arange(shape[0]) // 2]
    if kind == "wide":
        return x * 10.0 ** torch.randint(-3, 4, shape, generator=generator)
    if kind == "offset":
        return x + 100
    return x


def _related(x: Tensor, shape: Sequence[int], kind: str, relation: str, generator: torch.Generator) -> Tensor:
    """The teacher, of another shape too where the two are not compared element by element."""
    other = _filled(shape, kind, generator)
    if relation == "independent" or tuple(shape) != x.shape:
        return other
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    by = {"equal": x, "close": x + 1e-2 * noise, "closer": x * (1 + 1e-4 * noise), "opposite": -x, "scaled": 3 * x}
    return by[relation]


def _fitting(x: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
    """Of that magnitude as far as the dtype holds it: inf is drawn where it is meant."""
    largest = torch.finfo(dtype).max / 4
    return (x * 10.0**exponent).clamp(-largest, largest).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers (but for "expanded", the first row for all) in other memory."""
    if x.dim() == 0 or x.numel() == 0:
        return x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    if layout == "sliced":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "size one":  # strides of dimensions of size 1 mean nothing, and may be anything
        return x.as_strided(x.shape, [7 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])
    if layout == "channels last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


@st.composite
def pairs(
    draw: Callable[..., Any],
    student_shape: Sequence[int],
    teacher_shape: Sequence[int] | None = None,
    *,
    most: int = 30,
    special: bool = True,
    kinds: Sequence[str] = KINDS,
) -> tuple[Tensor, Tensor]:
    """Student and teacher: how they are filled, how they are related, where a special value is, how they lie."""
    teacher_shape = student_shape if teacher_shape is None else teacher_shape
    generator = torch.Generator().manual_seed(draw(seeds))
    kind, relation, exponent = draw(st.sampled_from(kinds)), draw(st.sampled_from(RELATIONS)), draw(exponents(most))
    student = _filled(student_shape, kind, generator)
    teacher = _related(student, teacher_shape, kind, relation, generator)
    dtype = draw(dtypes)
    teacher_dtype = dtype if draw(st.integers(0, 7)) else draw(dtypes)
    found = []
    for x, own in ((student, dtype), (teacher, teacher_dtype)):
        fitting = _fitting(x, exponent, own).to(DEVICE)
        if special and fitting.numel() and not draw(st.integers(0, 5)):
            fitting.view(-1)[draw(st.integers(0, fitting.numel() - 1))] = draw(st.sampled_from(SPECIAL))
        found.append(laid_out(fitting, draw(st.sampled_from(LAYOUTS))))
    return found[0], found[1]


@st.composite
def labels(draw: Callable[..., Any], n: int, classes: int, *, ignore: int | None = -100) -> Tensor:
    """(n,) with the first and the last class, and rows to ignore, in front where there are any."""
    generator = torch.Generator().manual_seed(draw(seeds))
    found = torch.randint(classes, (n,), generator=generator)
    edges = [0, classes - 1, *([] if ignore is None else [ignore])]
    for place in range(min(n, 3)):
        if draw(st.booleans()):
            found[place] = draw(st.sampled_from(edges))
    return found.to(DEVICE)


def fractions(shape: Sequence[int], edges: Sequence[float] = (0.0, 1.0)) -> st.SearchStrategy[Tensor]:
    """In [0, 1], the first ones at the edges."""

    def make(seed: int) -> Tensor:
        x = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        flat = x.view(-1)
        flat[: len(edges)] = torch.tensor(edges)[: flat.numel()]
        return x.to(DEVICE)

    return seeds.map(make)
