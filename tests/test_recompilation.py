"""Batch sizes and weights that change while a network trains: two compilations at most, for every loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from checking import DEVICE, check_close, gradients
from every_loss import CLASSES, LOSSES, Loss

pytestmark = pytest.mark.slow

SIZES = (8, 4, 6, 10, 12, 16, 24, 3, 5, 7, 9, 11)  # of the batch; all but the first are odd, even and prime


class Counter:
    """A backend of torch.compile that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def check(loss: Loss, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(lambda s, t, w: w * loss(s, t), backend=counter, fullgraph=True, dynamic=dynamic)
    for step, rows in enumerate(SIZES):
        s, t = torch.randn(rows, CLASSES, device=DEVICE, requires_grad=True), torch.randn(rows, CLASSES, device=DEVICE)
        weight = 0.9 - 0.07 * step
        actual, expected = compiled(s, t, weight), weight * loss(s, t)
        check_close("loss", actual, expected, 1e-6)
        check_close("gradient", gradients(actual, [s])[0], gradients(expected, [s])[0], 1e-6)
    assert 1 <= counter.graphs <= 2


@pytest.mark.parametrize("name", list(LOSSES))
def test_twelve_sizes_and_weights_take_two_compilations(name: str) -> None:
    check(LOSSES[name], dynamic=None)


@pytest.mark.parametrize("name", ["stkd mixed", "sp", "amd area", "rkd", "linear_kd"])
def test_what_is_dynamic_from_the_start(name: str) -> None:
    check(LOSSES[name], dynamic=True)
