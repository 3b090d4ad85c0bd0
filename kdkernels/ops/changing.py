"""Numbers that change while a compiled graph stays: a schedule's temperature, a weight that warms up.

An op's float argument is a constant of a compiled graph, so that a new value would compile it anew. Numbers that
torch.compile has found to change enter an op together, as one tensor on the CPU, which the op reads when it runs.
Nothing else does: such a tensor keeps Inductor from making a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class _Place(float):
    """In the place of a number: the how manieth it is."""


def changing(args: list[Any], floats: Sequence[int]) -> tuple[list[Any], Tensor | None]:
    """For Dynamo: an op's arguments and None, or with placeholders for its numbers and these as a tensor (n,), fp64.

    ``floats`` says which arguments are numbers or lists of them: by type an int that stands for one would be missed.
    A placeholder is 0 where the number is, for the op's outputs without values may depend on that.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy, as torch.compile has by now

    filled, numbers, changes = list(args), [], False
    for i in floats:
        several = isinstance(args[i], (list, tuple))
        placeholders = []
        for number in args[i] if several else (args[i],):
            numbers.append(number)
            placeholders.append(1.0 if number != 0 else 0.0)
            changes = changes or not has_static_value(number)
        filled[i] = placeholders if several else placeholders[0]
    if not changes:
        return args, None
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return filled, torch.stack([one * number for number in numbers])


def with_values(args: Sequence[Any], values: Tensor) -> list[Any]:
    """The arguments as an op gets them, with these values for their numbers."""
    return _with(args, iter(values.tolist()))


def kept_values(keep: Callable[[Sequence[Any]], Sequence[Any]], args: Sequence[Any], values: Tensor) -> Tensor | None:
    """Of all numbers' values those of the numbers that ``keep`` takes from the arguments, if it takes any."""
    places = [int(place) for x in keep(_with(args, map(_Place, range(len(values))))) for place in _numbers(x)]
    return torch.stack([values[place] for place in places]) if places else None


def _numbers(x: Any) -> Sequence[float]:
    if isinstance(x, float):
        return (x,)
    return x if isinstance(x, (list, tuple)) and x and isinstance(x[0], float) else ()


def _with(args: Sequence[Any], values: Iterator[float]) -> list[Any]:
    return [next(values) if isinstance(x, float) else [next(values) for _ in x] if _numbers(x) else x for x in args]
