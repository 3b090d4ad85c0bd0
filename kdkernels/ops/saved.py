"""What an op's forward pass leaves to its backward pass: tensors, lists of them, and anything else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from torch import Tensor


def is_layers(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], Tensor)


def save(ctx: Any, kept: Sequence[Any]) -> None:
    """Tensors by autograd, which watches that nobody changes them; ``ctx.kept`` has the rest, and gaps for them."""
    tensors: list[Tensor] = []
    gaps: list[tuple[int, int]] = []  # where a tensor belongs, or how many tensors as a list
    rest = list(kept)
    for place, value in enumerate(kept):
        if isinstance(value, Tensor):
            gaps.append((place, 0))
            # a teacher's outputs may come from torch.inference_mode(), and autograd refuses to save those as they are
            tensors.append(value.clone() if value.is_inference() else value)
            rest[place] = None
        elif isinstance(value, (list, tuple)):
            gaps.append((place, len(value)))
            for x in value:
                tensors.append(x.clone() if x.is_inference() else x)
            rest[place] = None
    ctx.save_for_backward(*tensors)
    ctx.kept, ctx.gaps = rest, gaps


def saved(ctx: Any) -> list[Any]:
    tensors, kept = iter(ctx.saved_tensors), ctx.kept.copy()
    for place, count in ctx.gaps:
        kept[place] = list(islice(tensors, count)) if count else next(tensors)
    return kept
