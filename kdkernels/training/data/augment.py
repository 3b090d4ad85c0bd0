"""The usual augmentations, of whole batches on their device: each image its own, nothing waits for the host."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, pad


class CropFlip(nn.Module):
    """A window of the image's own size out of the image with ``padding`` pixels of zeros around, which is the mean
    colour of standardised images, and a flip.

    Args:
        padding: pixels on each side. CIFAR's usual is 4.
        flip: probability of a horizontal flip. 0 where left and right mean something, as in text.
    """

    def __init__(self, padding: int = 4, flip: float = 0.5) -> None:
        super().__init__()
        if padding < 0 or not 0 <= flip <= 1:
            raise ValueError(f"CropFlip: padding must be 0 or more and flip in [0, 1], got {padding} and {flip}")
        self.padding, self.flip = padding, flip

    def forward(self, images: Tensor) -> Tensor:
        n, _, height, width = images.shape
        rows = _window(n, height, 2 * self.padding, images.device)
        columns = _window(n, width, 2 * self.padding, images.device)
        mirrored = torch.rand(n, 1, device=images.device) < self.flip
        columns = torch.where(mirrored, columns.flip(1), columns)
        each = torch.arange(n, device=images.device)[:, None, None]
        padded = pad(images, (self.padding,) * 4)
        return padded[each, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def _window(n: int, length: int, slack: int, device: torch.device) -> Tensor:
    """(n, length): consecutive places from one of 0 .. slack on."""
    start = torch.randint(slack + 1, (n, 1), device=device)
    return start + torch.arange(length, device=device)


class ResizedCropFlip(nn.Module):
    """A window of random area and shape, resized to ``size`` by bilinear interpolation, and a flip: ImageNet's usual.

    Args:
        size: height and width of the result.
        scale: the window's least and greatest share of the area.
        ratio: its least and greatest width over height, drawn on a logarithmic scale; the window is cut to the image.
        flip: probability of a horizontal flip.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ) -> None:
        super().__init__()
        if size < 1 or not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1] or not 0 <= flip <= 1:
            raise ValueError(
                "ResizedCropFlip: size must be 1 or more, scale in (0, 1], ratio positive and flip in [0, 1], got "
                f"{size}, {scale}, {ratio} and {flip}"
            )
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip

    def forward(self, images: Tensor) -> Tensor:
        n, channels, height, width = images.shape

        def draw(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(n, device=images.device)

        area, log_ratio = draw(*self.scale), draw(*map(math.log, self.ratio))
        # shares of the image's width and height
        wide = (area * (log_ratio.exp() * height / width)).sqrt().clamp(max=1)
        high = (area / (log_ratio.exp() * height / width)).sqrt().clamp(max=1)
        mirror = 1 - 2 * (draw(0, 1) < self.flip).float()
        x, y = draw(-1, 1) * (1 - wide), draw(-1, 1) * (1 - high)
        zero = torch.zeros_like(x)
        theta = torch.stack([torch.stack([wide * mirror, zero, x], 1), torch.stack([zero, high, y], 1)], 1)
        grid = affine_grid(theta, [n, channels, self.size, self.size], align_corners=False)
        return grid_sample(images, grid.to(images.dtype), padding_mode="reflection", align_corners=False)


# by name, for images of a size
AUGMENTATIONS: dict[str, Callable[[int], nn.Module | None]] = {
    "none": lambda size: None,
    "crop": lambda size: CropFlip(max(1, size // 8), flip=0.0),
    "crop-flip": lambda size: CropFlip(max(1, size // 8)),
    "resized-crop-flip": ResizedCropFlip,
}


def make_augmentation(name: str, size: int) -> nn.Module | None:
    """One of ``AUGMENTATIONS`` for images that networks see with ``size`` pixels; None for "none"."""
    if name not in AUGMENTATIONS:
        raise ValueError(f"an augmentation is one of {', '.join(AUGMENTATIONS)}, got {name!r}")
    return AUGMENTATIONS[name](size)
