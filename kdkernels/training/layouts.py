"""Which axis of a feature is which: n the batch, c the channels, h and w a map's, l a sequence's."""

from __future__ import annotations

from torch import Tensor

LAYOUTS = ("nc", "nchw", "nhwc", "nlc", "ncl")


def check_layout(layout: str | None, caller: str) -> None:
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"{caller}: layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")


def find_layout(x: Tensor, layout: str | None, caller: str) -> str:
    """The layout of a feature: the given one, or a guess where there is no doubt."""
    shape = tuple(x.shape)
    if x.dim() == 2:  # pooled already
        return "nc"
    if layout is not None:
        if x.dim() != len(layout):
            raise ValueError(f"{caller}: layout={layout!r} has {len(layout)} axes, and the features are {shape}")
        return layout
    # a map that is square in its first two sizes and not in its last two is (N, H, W, C), as Swin's
    if x.dim() == 4 and not shape[1] == shape[2] != shape[3]:
        return "nchw"
    choices = {3: "'nlc' (tokens) or 'ncl'", 4: "'nchw' or 'nhwc'"}.get(x.dim(), "a layer of 2 to 4 axes")
    raise ValueError(f"{caller}: which axis of the features {shape} holds the channels is not clear: layout={choices}")


def pooled(x: Tensor, layout: str | None = None, caller: str = "pooled") -> Tensor:
    """(N, C): the mean over all positions."""
    axes = find_layout(x, layout, caller)
    positions = [axis for axis, name in enumerate(axes) if name not in "nc"]
    return x.mean(positions) if positions else x
