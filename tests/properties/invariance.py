"""What the tests of invariants share: ordinary numbers in float32, and how two results are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from checking import DEVICE
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def shapes(rows: Sequence[int] = (2, 3, 7, 13), columns: Sequence[int] = (3, 7, 31)) -> st.SearchStrategy[list[int]]:
    return st.tuples(st.sampled_from(rows), st.sampled_from(columns)).map(list)


def of_numbers(shape: Sequence[int]) -> st.SearchStrategy[Pair]:
    """Student and teacher of order 1, sometimes 3."""

    def make(seed: int, scale: float) -> Pair:
        generator = torch.Generator().manual_seed(seed)
        return tuple(scale * torch.randn(*shape, generator=generator).to(DEVICE) for _ in range(2))  # type: ignore[return-value]

    return st.builds(make, seeds, st.sampled_from([1.0, 3.0]))


def gradient(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Pair:
    """The loss and its gradient."""
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def permuted(x: Tensor, *orders: Tensor) -> Tensor:
    """The first dimensions in other orders."""
    for dim, order in enumerate(orders):
        x = x.index_select(dim, order.to(x.device))
    return x


def no_more_than(relative: float, what: str, actual: Tensor, expected: Tensor, absolute: float = 0.0) -> None:
    """|actual - expected| <= relative |expected| + absolute, of all numbers together."""
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    assert error <= relative * size + absolute, f"{what}: off by {error:.3e}, of {size:.3e}"
