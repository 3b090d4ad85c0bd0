"""Numbers that change under torch.compile, on their way into an op; tests/test_recompilation.py has every loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import pytest
import torch
from checking import DEVICE, check_close, gradients
from torch import Tensor

import kdkernels
from kdkernels.ops.changing import kept_values, with_values


class Stacks:
    """A backend of torch.compile that counts, of each graph, the tensors that are made of numbers."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.made.append(sum(node.target is torch.stack for node in graph.graph.nodes))
        return graph.forward


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, device=DEVICE, requires_grad=True), torch.randn(shape, device=DEVICE)


@pytest.mark.parametrize("values", [(2.0, 3.0, 4.5), (2, 3, 5)])
def test_only_a_number_that_changes_becomes_a_tensor(values: tuple[float, ...]) -> None:
    torch._dynamo.reset()
    stacks = Stacks()
    run = torch.compile(kdkernels.kd_loss, backend=stacks, fullgraph=True)
    s, t = pair(8, 5)
    for temperature in values:
        actual, expected = (f(s, t, temperature=temperature) for f in (run, kdkernels.kd_loss))
        check_close("loss", actual, expected, 1e-6)
        check_close("gradient", gradients(3 * actual, [s])[0], gradients(3 * expected, [s])[0], 1e-6)
    assert stacks.made == [0, 1]


def test_a_placeholder_is_zero_where_the_number_is() -> None:
    """What an op saves for its backward pass may depend on which of its terms have a weight."""
    torch._dynamo.reset()
    s, t = pair(8, 5)
    placeholders: list[list[float]] = []

    def look(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        (op,) = (node for node in graph.graph.nodes if "softmax_pearson" in str(node.target))
        placeholders.append([x for x in op.args if isinstance(x, float)])
        return graph.forward

    run = torch.compile(kdkernels.dist_loss, backend=look, fullgraph=True)
    for beta in (0.5, 0.25, 0.0, 0.75):
        actual, expected = (f(s, t, temperature=2.0, beta=beta, gamma=0.0) for f in (run, kdkernels.dist_loss))
        check_close("loss", actual, expected, 1e-6)
        if beta:
            check_close("gradient", gradients(actual, [s])[0], gradients(expected, [s])[0], 1e-6)
    # temperature, beta, gamma, eps
    assert placeholders[:2] == [[2.0, 0.5, 0.0, 1e-8], [1.0, 1.0, 0.0, 1.0]]
    assert len(placeholders) == 3  # 0 has a graph of its own


def test_numbers_go_where_they_belong() -> None:
    args = ["mean", 0.0, [1.0, 0.0], 3, True, 1.0, []]
    values = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert with_values(args, values) == ["mean", 0.1, [0.2, 0.3], 3, True, 0.4, []]
    kept = kept_values(itemgetter(5, 0, 2), args, values)
    assert kept is not None
    assert kept.tolist() == [0.4, 0.2, 0.3]
    assert kept_values(itemgetter(0, 3), args, values) is None
    assert with_values([[1.0], 2], values[:1]) == [[0.1], 2]
