"""How wide features are, as the layers state it: nothing has to run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .methods import Method, Outputs
from .taps import unwrap


def width(module: nn.Module) -> int | None:
    """Channels of a module's output, read off its last layer that states them; None if no layer does."""
    for layer in reversed(list(module.modules())):
        for name in ("num_features", "out_channels", "out_features"):
            if isinstance(value := getattr(layer, name, None), int):
                return value
    return None


def stated_outputs(model: nn.Module, layers: Sequence[str], method: Method) -> Outputs:
    """Empty outputs of the widths that the layers state.

    Raises:
        ValueError: a layer that states none.
    """
    bare = unwrap(model)
    logits_width = width(bare) if method.needs_classes else 0
    widths = [logits_width, *(width(bare.get_submodule(name)) for name in layers)]
    if None in widths:
        raise ValueError(
            f"method {type(method).__name__} has parameters of its own, and the widths of {list(layers)} of "
            f"{type(bare).__name__} cannot be read off its layers: give a batch of images as example=..."
        )
    like = next(bare.parameters(), torch.empty(0))  # heads get the student's device, and float64 if that is its
    logits, *features = (torch.empty(1, n, dtype=like.dtype, device=like.device) for n in widths if n is not None)
    return Outputs(logits, features)
