"""The losses under torch.compile and torch.export: the eager numbers, few compilations, teachers of all kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from checking import DEVICE, check_close, gradients
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import kdkernels
from kdkernels import amd_loss, correlation_loss, kd_loss, sp_loss, stkd_loss

pytestmark = pytest.mark.slow

Loss = Callable[[Tensor, Tensor], Tensor]
CLASSES = 12


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def mixed(s: Tensor, t: Tensor) -> Tensor:
    a = torch.arange(len(s), device=s.device) % 3
    return stkd_loss(s, t, a, (a + 1) % 3, torch.full((len(s),), 0.4, device=s.device), decouple=(1.0, 8.0))


def maps(x: Tensor) -> Tensor:
    return x.view(-1, 3, 2, 2)


LOSSES: dict[str, Loss] = {
    "kd": kd_loss,
    "stkd": lambda s, t: stkd_loss(s, t, torch.arange(len(s), device=s.device) % 3),
    "stkd mixed": mixed,
    "sp": lambda s, t: sp_loss([s, s * s], [t, t]),
    "amd": lambda s, t: amd_loss(maps(s), maps(t), local_weight=0.2),
    "amd area": lambda s, t: amd_loss([maps(s), maps(s)], [maps(t), maps(t)], layer_weights="area"),
    "correlation": lambda s, t: correlation_loss(s, t, views=2),
}


@pytest.fixture(autouse=True)
def _forget() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_teacher_in_inference_mode(name: str) -> None:
    """Eager, compiled, and compiled after a teacher without the mode: always that teacher's numbers."""
    loss, s, t = LOSSES[name], randn(4, CLASSES).requires_grad_(), randn(4, CLASSES)
    with torch.inference_mode():
        inference = t * 1
    assert inference.is_inference()
    expected = loss(s, t)
    (gradient,) = gradients(expected, [s])
    value = loss(s, inference)
    assert torch.equal(value, expected)
    assert torch.equal(gradients(value, [s])[0], gradient)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)  # AOTAutograd decides what is saved
    for teacher in (inference, t, inference):
        value = compiled(s, teacher)
        check_close("loss", value, expected, 1e-6)
        check_close("gradient", gradients(value, [s])[0], gradient, 1e-6)


class Counter:
    """A backend of torch.compile that counts the graphs which it hands to AOTAutograd."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return aot_eager(graph, inputs)


def check_compilations(loss: Loss, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Forward and backward over all batches: the eager numbers, and two compilations at most."""
    counter = Counter()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for s, t in batches:
        s.requires_grad_()
        actual, expected = compiled(s, t), loss(s, t)
        check_close("loss", actual, expected, 1e-6)
        check_close("gradient", gradients(actual, [s])[0], gradients(expected, [s])[0], 1e-6)
    assert 1 <= counter.graphs <= 2


@pytest.mark.parametrize("name", list(LOSSES))
def test_seven_batch_sizes_take_two_compilations(name: str) -> None:
    check_compilations(LOSSES[name], [(randn(n, CLASSES), randn(n, CLASSES)) for n in (8, 4, 6, 10, 12, 16, 24)])


@pytest.mark.parametrize("name", ["stkd mixed", "sp"])
def test_inductors_code_takes_any_batch(name: str) -> None:
    """Where plain code stands around the op; elsewhere Inductor has nothing to do but to call the op."""
    compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=True)
    for n in (8, 5, 12):
        s, t = randn(n, CLASSES).requires_grad_(), randn(n, CLASSES)
        actual, expected = compiled(s, t), LOSSES[name](s, t)
        check_close("loss", actual, expected, 1e-6)
        check_close("gradient", gradients(actual, [s])[0], gradients(expected, [s])[0], 1e-6)


def test_seven_map_sizes_take_two_compilations() -> None:
    """The area is a plain number inside the op alone: a graph has no such number."""

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return amd_loss([s, s[:, :, ::2, ::2]], [t, t[:, :, ::2, ::2]], layer_weights="area")

    sizes = (8, 6, 10, 12, 14, 16, 20)
    check_compilations(loss, [(randn(3, 2, n, n + 2).relu(), randn(3, 4, n, n + 2).relu()) for n in sizes])


def test_a_temperature_that_changes() -> None:
    s, t = randn(4, CLASSES), randn(4, CLASSES)
    loss = lambda temperature: kd_loss(s, t, temperature=temperature)  # noqa: E731
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for temperature in (4.0, 3.5, 2.0):
        torch.testing.assert_close(compiled(temperature), kd_loss(s, t, temperature=temperature))


def test_numpy_scalars_are_numbers() -> None:
    s, t = randn(4, CLASSES), randn(4, CLASSES)
    for scalar in (np.float32(2), np.float64(2), np.int64(2)):
        assert torch.equal(kd_loss(s, t, temperature=scalar), kd_loss(s, t, temperature=2.0))


EXPORTED = [kdkernels.KDLoss(2.0), kdkernels.SPLoss(), kdkernels.RKDLoss(), kdkernels.CCLoss(), kdkernels.DISTLoss()]
EXPORTED += [kdkernels.MLLDLoss(), kdkernels.CorrelationLoss(views=1), kdkernels.AlignmentLoss()]


@pytest.mark.parametrize("module", EXPORTED, ids=lambda module: type(module).__name__)
def test_export_with_a_dynamic_batch(module: nn.Module) -> None:
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(module, (randn(6, 5), randn(6, 5)), dynamic_shapes=(batch, batch)).module()
    for rows in (9, 2, 40):
        s, t = randn(rows, 5), randn(rows, 5)
        assert torch.equal(program(s, t), module(s, t))


@pytest.mark.parametrize("name", list(LOSSES))
def test_no_second_derivative(name: str) -> None:
    """Where torch.compile leaves the backward pass to autograd the op refuses; AOTAutograd refuses by itself."""
    s, t = randn(4, CLASSES).requires_grad_(), randn(4, CLASSES)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(torch.compile(LOSSES[name], backend="eager")(s, t), s, create_graph=True)
    compiled = torch.compile(LOSSES[name], backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(s, t).square(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), s)
