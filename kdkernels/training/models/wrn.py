"""Wide ResNets (Zagoruyko and Komodakis 2016), with the parameter names of RepDistiller's models/wrn.py.

``block1`` .. are the stages; their outputs come before batch norm and ReLU. ``wrn_16_2``: 16 layers, twice the width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .initial import start


class WideBlock(nn.Module):
    """Norm and ReLU come before each of the two convolutions."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.convShortcut = None if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        out = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideStage(nn.Module):
    def __init__(self, count: int, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        blocks = (WideBlock(cout, cout, 1) for _ in range(count - 1))
        self.layer = nn.Sequential(WideBlock(cin, cout, stride), *blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """(B, C, H, W) to (B, classes); 6 n + 4 layers."""

    def __init__(self, depth: int, widen: int, in_channels: int, classes: int) -> None:
        super().__init__()
        count = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = WideStage(count, 16, 16 * widen, 1)
        self.block2 = WideStage(count, 16 * widen, 32 * widen, 2)
        self.block3 = WideStage(count, 32 * widen, 64 * widen, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, classes)
        start(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(torch.relu(self.bn1(out)).mean((2, 3)))
