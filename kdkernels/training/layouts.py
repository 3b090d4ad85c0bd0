"""Which axis of a feature is which: n the batch, c the channels, h and w a map's, l a sequence's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

LAYOUTS = ("nc", "nchw", "nhwc", "nlc", "ncl")
Layout = str | Sequence[str | None] | None  # of both networks' features, or a pair; None guesses where it is clear
Size = tuple[int, int]  # height and width of the images that features are of
SPECIAL = 8  # a class token, one for distillation, registers: no more of them than this stand before a map's tokens


def image_size(images: Tensor | Mapping[str, Any]) -> Size | None:
    """Of (N, C, H, W) images, alone or among a model's inputs; None for words and the like."""
    inputs = images.values() if isinstance(images, Mapping) else [images]
    sizes = [(x.shape[2], x.shape[3]) for x in inputs if isinstance(x, Tensor) and x.dim() == 4]
    return sizes[0] if sizes else None


def channels_last(x: Tensor, size: Size | None) -> bool:
    """Whether a map of such images can only be (N, H, W, C), as Swin's: by its sides, which are shaped as theirs."""
    if x.dim() != 4:
        return False
    height, width = size or (1, 1)

    def like(h: int, w: int) -> bool:  # of one stride, rounded alike
        return abs(h * width - w * height) < max(height, width)

    return like(x.shape[1], x.shape[2]) and not like(x.shape[2], x.shape[3])


def check_map(x: Tensor, size: Size | None, whose: str, remedy: str) -> None:
    """Refuse what only looks like a map (N, C, H, W), or does not even."""
    if x.dim() == 4 and not channels_last(x, size):
        return
    found = {3: "tokens", 4: "maps with channels last"}.get(x.dim(), "no maps")
    raise ValueError(f"{whose} must be maps (N, C, H, W), and {tuple(x.shape)} are {found}: {remedy}")


def token_map(x: Tensor, size: Size | None) -> Tensor:
    """(N, L, C) tokens of such images as a map (N, C, H, W), without the first ones, which are no part of it; maps with
    channels last as (N, C, H, W); others as they are.

    Raises:
        ValueError: there is no map of L tokens that is shaped as the images are.
    """
    if x.dim() == 4:
        return x.permute(0, 3, 1, 2) if channels_last(x, size) else x
    if x.dim() != 3:
        return x
    tokens = x.shape[1]
    for special in range(SPECIAL + 1 if size else 0):
        height, width = size or (1, 1)
        h = round(math.sqrt((tokens - special) * height / width)) if tokens > special else 0
        w = (tokens - special) // h if h else 0
        if h and h * w == tokens - special and h * width == w * height:
            return x[:, special:].transpose(1, 2).unflatten(2, (h, w))
    of = f"images of {size[0]} x {size[1]}" if size else "what is no image"
    raise ValueError(f"adapt='map': the {tokens} tokens of {tuple(x.shape)} are no map of {of}: name other layers")


def layout_pair(layout: Layout, caller: str) -> tuple[str | None, ...]:
    """The student's and the teacher's layout, where one is for both or a pair is given."""
    pair = (layout, layout) if layout is None or isinstance(layout, str) else tuple(layout)
    if len(pair) != 2:
        raise ValueError(f"{caller}: layout must be one for both networks or a pair, got {layout!r}")
    for each in pair:
        if each is not None and each not in LAYOUTS:
            raise ValueError(f"{caller}: layout must be one of {', '.join(map(repr, LAYOUTS))}, got {each!r}")
    return pair


def find_layout(x: Tensor, layout: str | None, caller: str) -> str:
    """The layout of a feature: the given one, or a guess where there is no doubt."""
    shape = tuple(x.shape)
    if x.dim() == 2:  # pooled already
        return "nc"
    if layout is not None:
        if x.dim() != len(layout):
            raise ValueError(
                f"{caller}: layout={layout!r} has {len(layout)} axes, and the features are {shape}; of networks that "
                "differ it is a pair, layout=(student's, teacher's)"
            )
        return layout
    # a map that is square in its first two sizes and not in its last two is (N, H, W, C), as Swin's
    if x.dim() == 4 and not shape[1] == shape[2] != shape[3]:
        return "nchw"
    choices = {3: "'nlc' (tokens) or 'ncl'", 4: "'nchw' or 'nhwc'"}.get(x.dim(), "a layer of 2 to 4 axes")
    raise ValueError(
        f"{caller}: which axis of the features {shape} holds the channels is not clear: layout={choices}, or a pair of "
        "layouts for student and teacher"
    )


def pooled(x: Tensor, layout: str | None = None, caller: str = "pooled") -> Tensor:
    """(N, C): the mean over all positions."""
    axes = find_layout(x, layout, caller)
    positions = [axis for axis, name in enumerate(axes) if name not in "nc"]
    return x.mean(positions) if positions else x
