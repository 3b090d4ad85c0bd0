"""Small convolutional networks for the demo and for first experiments: three stages, pooling, one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ConvBlock(nn.Sequential):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__(nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvBlock(cin, cout, stride), nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        )
        self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ConvNet(nn.Module):
    """(B, C, H, W) to (B, classes); the outputs of ``stages.0`` .. are the features to distil.

    ``stem``: channels of a convolution of stride 2 in front of the stages, 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        channels: Sequence[int],
        block: type[nn.Module] = ConvBlock,
        strides: Sequence[int] = (1, 2, 2),
        stem: int = 0,
    ) -> None:
        super().__init__()
        self.stem = ConvBlock(in_channels, stem, 2) if stem else nn.Identity()
        widths = [stem or in_channels, *channels]
        self.stages = nn.Sequential(*(block(a, b, s) for a, b, s in zip(widths, channels, strides, strict=False)))
        self.fc = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


def small_student(in_channels: int, classes: int) -> ConvNet:
    """4, 8, 16 channels, one convolution per stage."""
    return ConvNet(in_channels, classes, (4, 8, 16))


def small_teacher(in_channels: int, classes: int) -> ConvNet:
    """32, 64, 128 channels, one basic block per stage."""
    return ConvNet(in_channels, classes, (32, 64, 128), BasicBlock)


def medium_student(in_channels: int, classes: int) -> ConvNet:
    """16, 32, 64 channels, one convolution of stride 2 per stage: for images of about 32 x 32."""
    return ConvNet(in_channels, classes, (16, 32, 64), strides=(2, 2, 2))


def medium_teacher(in_channels: int, classes: int) -> ConvNet:
    """A convolution of stride 2, then 24, 48, 96 channels, one basic block per stage; maps as medium_student's."""
    return ConvNet(in_channels, classes, (24, 48, 96), BasicBlock, stem=24)
