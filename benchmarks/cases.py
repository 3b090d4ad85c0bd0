"""A case: one loss on one shape and dtype, and everything that can compute it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import kdkernels
from kdkernels.ops import backend as backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADIENT = 0.7  # what backward starts from: not 1, which some implementations take a short cut for
TOLERANCE = 1e-5  # of our losses and gradients' norms against fp64, beside one rounding of a half-precision gradient
Loss = Callable[..., Tensor]
Inputs = tuple[list[Tensor], list[Tensor]]  # the student's tensors, which get gradients, and the constants

# Where a row's gain over the published formula comes from; the reports explain the words (benchmarks/render.py).
Gain = Literal["kernel", "algebra", "baseline"]


def slow_on_cpu(otherwise: Gain) -> Gain:
    """For a row on which CPUs take the published formula at least twice as long per element as on its neighbours."""
    return "baseline" if DEVICE == "cpu" else otherwise


@dataclass(frozen=True)
class Case:
    """bytes: what forward and backward have to move at least, together;  flops: theirs where products dominate, else
    0;  rows_are_independent: the loss is a mean over rows, so that fp64 can be had in parts."""

    group: str
    name: str
    ours: Loss
    published: Loss
    inputs: Callable[[], Inputs]
    bytes: int
    gain: Gain
    flops: int = 0
    dtype: torch.dtype = torch.float32
    rows_are_independent: bool = False
    liger: Loss | None = None

    @property
    def gradient(self) -> float:
        """In fp16 scaled as GradScaler does at first, or small gradients would be zero."""
        return GRADIENT * (2**16 if self.dtype == torch.float16 else 1)

    @property
    def label(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


def call(loss: Loss, inputs: Inputs) -> Tensor:
    return loss(*inputs[0], *inputs[1]).reshape(())


def clear(inputs: Inputs) -> None:
    for x in inputs[0]:
        x.grad = None


@cache
def upstream(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


class Provider(NamedTuple):
    """Something that computes a case's loss; ``backend`` is in force in its forward and its backward pass."""

    loss: Loss
    gradient: float  # what backward starts from
    backend: str = "auto"

    def step(self, inputs: Inputs) -> Tensor:
        clear(inputs)
        with kdkernels.use_backend(self.backend):
            loss = call(self.loss, inputs)
            loss.backward(upstream(self.gradient, loss.dtype))
        return loss.detach()


PEERS = ("eager", "compile", "compile max-autotune", "liger")


def our_backends(inputs: Inputs) -> list[str]:
    """Those that run here, in the order in which auto tries them."""
    order = backends.AUTO_ORDER[DEVICE]
    example = inputs[0][0]
    return [b for b in order if all(backends.why_not(op, b, example) is None for op in backends.OPS)]


def providers(case: Case, inputs: Inputs, names: Sequence[str] | None = None) -> dict[str, Provider]:
    """Our backends and the published formula in PyTorch, eager and compiled; ``names``: only these."""
    found = {b: Provider(case.ours, case.gradient, b) for b in our_backends(inputs)}
    found["eager"] = Provider(case.published, case.gradient)
    if case.liger is not None and DEVICE == "cuda":
        found["liger"] = Provider(case.liger, case.gradient)
    found["compile"] = Provider(torch.compile(case.published, dynamic=False), case.gradient)
    best = torch.compile(case.published, dynamic=False, mode="max-autotune")
    found["compile max-autotune"] = Provider(best, case.gradient)
    return {name: provider for name, provider in found.items() if names is None or name in names}


# ---- correctness, before anything is timed


def oracle(case: Case, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients in fp64, of our definition, on the same (rounded) inputs; by rows where that is possible."""
    students, constants = inputs
    rows = students[0].shape[0]
    part = max(1, min(rows, (1 << 22) // max(students[0][0].numel(), 1))) if case.rows_are_independent else rows
    total, gradients = torch.zeros((), dtype=torch.float64, device=DEVICE), [[] for _ in students]
    for i in range(0, rows, part):

        def cut(x: Tensor, start: int = i) -> Tensor:
            x = x[start : start + part] if x.dim() and x.shape[0] == rows else x
            return x.double() if x.is_floating_point() else x

        leaves = [cut(x.detach()).requires_grad_() for x in students]
        share = len(leaves[0]) / rows
        part_inputs = leaves, [cut(x) for x in constants]
        total += share * Provider(case.ours, case.gradient, "reference").step(part_inputs)
        for kept, leaf in zip(gradients, leaves, strict=True):
            # rows come in parts where there are many of them, and fp32 is exact enough for their gradients
            kept.append(leaf.grad if part == rows else (share * leaf.grad).float())
    return total, [torch.cat(g) for g in gradients]


def errors(provider: Provider, inputs: Inputs, truth: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    """Relative error of the loss, and of the gradients' norm."""
    value = provider.step(inputs)
    off = size = 0.0
    for x, g in zip(inputs[0], truth[1], strict=True):
        off += float(_squares(x.grad, g))
        size += float(_squares(g, None))
    clear(inputs)
    return float((value.double() - truth[0]).abs() / truth[0].abs()), (off / size) ** 0.5


def _squares(x: Any, y: Tensor | None) -> Tensor:
    """Sum of (x - y)^2 in fp64, a slice at a time: the largest gradients are a gigabyte."""
    x = x.reshape(-1)
    parts = x.split(1 << 24)
    others = y.reshape(-1).split(1 << 24) if y is not None else [None] * len(parts)
    return sum(
        (p.double() - (0 if o is None else o.double())).square().sum() for p, o in zip(parts, others, strict=True)
    )


def check(case: Case, name: str, found: tuple[float, float]) -> None:
    """Ours is not timed if it is wrong; what the published formula is off by is written down."""
    gradient = TOLERANCE + (torch.finfo(case.dtype).eps if case.dtype.itemsize == 2 else 0)
    if name not in PEERS and not (found[0] < TOLERANCE and found[1] < gradient):
        raise AssertionError(f"{case.label} on {name}: off from fp64 by {found}, allowed {(TOLERANCE, gradient)}")


# ---- inputs


def logits(rows: int, classes: int, dtype: torch.dtype, labels: int) -> Callable[[], Inputs]:
    """Student and teacher logits, and ``labels`` label vectors, with a weight if there are two."""

    def make() -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(0)
        pair = [2 * torch.randn(rows, classes, device=DEVICE, generator=generator).to(dtype) for _ in range(2)]
        constants = [torch.randint(classes, (rows,), device=DEVICE, generator=generator) for _ in range(labels)]
        if labels == 2:
            constants.append(torch.tensor(0.3, device=DEVICE))
        return [pair[0].requires_grad_()], [pair[1], *constants]

    return make


def maps(
    students: Sequence[Sequence[int]], teachers: Sequence[Sequence[int]], dtype: torch.dtype
) -> Callable[[], Inputs]:
    """Activations behind a ReLU."""

    def make() -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(0)
        first, second = (
            [torch.randn(*shape, device=DEVICE, generator=generator).relu().to(dtype) for shape in shapes]
            for shapes in (students, teachers)
        )
        return [x.requires_grad_() for x in first], second

    return make


def layerwise(loss: Loss, layers: int) -> Loss:
    """A loss of two lists as one of 2 L tensors, the student's first."""
    return lambda *tensors: loss(list(tensors[:layers]), list(tensors[layers:]))


def over_layers(loss: Loss, layers: int) -> Loss:
    """The published loss of one layer pair, summed over several, as users of the formula do."""
    return lambda *tensors: sum(loss(tensors[i], tensors[layers + i]).reshape(()) for i in range(layers))


def numel(shapes: Sequence[Sequence[int]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def feature_case(
    group: str,
    name: str,
    ours: Loss,
    published_loss: Loss,
    students: Sequence[Sequence[int]],
    teachers: Sequence[Sequence[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    products: int = 0,
    gain: Gain = "algebra",
) -> Case:
    """SP or AMD over layer pairs. Floor: read both, then read the student and write its gradient. ``products``: Gram
    products of the student's size per step, and one half as many of the teacher's."""
    teachers = students if teachers is None else teachers
    n_s, n_t = numel(students), numel(teachers)
    batch = students[0][0]
    return Case(
        group=group,
        name=name,
        ours=layerwise(ours, len(students)),
        published=over_layers(published_loss, len(students)),
        inputs=maps(students, teachers, dtype),
        bytes=(3 * n_s + n_t) * dtype.itemsize,
        gain=gain,
        flops=products * batch * (3 * n_s + n_t),  # symmetric products: B^2 D each; dQ = W Q: 2 B^2 D
        dtype=dtype,
    )


def layer_pair(
    group: str,
    loss: str,
    ours: Loss,
    published_loss: Loss,
    what: str,
    student: Sequence[int],
    teacher: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    products: int = 0,
    gain: Gain = "algebra",
) -> Case:
    """``feature_case`` of one layer pair, named after the loss, the network and the student's shape."""
    name = f"{loss} {what} {'x'.join(map(str, student))}"
    teachers = None if teacher is None else [teacher]
    return feature_case(group, name, ours, published_loss, [student], teachers, dtype, products, gain)
