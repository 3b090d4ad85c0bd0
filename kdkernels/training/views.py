"""Views of an image, for the losses that compare them."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_views(images: Tensor, views: int = 4) -> Tensor:
    """Turn each image by quarters: (B, C, H, W) to (views * B, C, H, W), row views * b + r: image b turned r times.

    Args:
        images: any dtype. Squares, unless views is 1.
        views: 1 to 4. Row 0 of each image is the image itself (MLKD's base row, the one that the task's loss sees).
    """
    if images.dim() != 4:
        raise ValueError(f"rotate_views: images must be (B, C, H, W), got {tuple(images.shape)}")
    if isinstance(views, bool) or not isinstance(views, int) or not 1 <= views <= 4:
        raise ValueError(f"rotate_views: views must be 1, 2, 3 or 4, got {views!r}")
    if views > 1 and images.shape[2] != images.shape[3]:
        raise ValueError(f"rotate_views: a quarter turn needs square images, got {tuple(images.shape)}")
    return torch.stack([torch.rot90(images, r, (2, 3)) for r in range(views)], 1).flatten(0, 1)
