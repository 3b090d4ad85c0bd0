"""ResNets for 32 x 32 images (He et al. 2016), with the parameter names of RepDistiller's resnet.py, resnetv2.py.

``layer1`` .. are the stages. 6 n + 2 layers: three stages of n basic blocks; ``x4`` has four times the width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .initial import start


def conv_bn(cin: int, cout: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, size, stride, size // 2, bias=False), nn.BatchNorm2d(cout))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut has a 1x1 convolution where the shape changes."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(cin, cout, 3, stride)
        self.conv2, self.bn2 = conv_bn(cout, cout, 3)
        self.downsample = conv_bn(cin, cout, 1, stride) if stride > 1 or cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last with four times the channels."""

    def __init__(self, cin: int, channels: int, stride: int) -> None:
        super().__init__()
        cout = 4 * channels
        self.conv1, self.bn1 = conv_bn(cin, channels, 1)
        self.conv2, self.bn2 = conv_bn(channels, channels, 3, stride)
        self.conv3, self.bn3 = conv_bn(channels, cout, 1)
        self.shortcut = conv_bn(cin, cout, 1, stride) if stride > 1 or cin != cout else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return torch.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """(B, C, H, W) to (B, classes)."""

    def __init__(self, depth: int, widths: Sequence[int], in_channels: int, classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = conv_bn(in_channels, widths[0], 3)
        self.layer1 = stage(BasicBlock, blocks, widths[0], widths[1], 1)
        self.layer2 = stage(BasicBlock, blocks, widths[1], widths[2], 2)
        self.layer3 = stage(BasicBlock, blocks, widths[2], widths[3], 2)
        self.fc = nn.Linear(widths[3], classes)
        start(self)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(out.mean((2, 3)))


class ResNet50(nn.Module):
    """ImageNet's ResNet-50 with a 3x3 convolution of stride 1 in front, and no pooling behind it."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, 64, 3)
        self.layer1 = stage(Bottleneck, 3, 64, 64, 1, expansion=4)
        self.layer2 = stage(Bottleneck, 4, 256, 128, 2, expansion=4)
        self.layer3 = stage(Bottleneck, 6, 512, 256, 2, expansion=4)
        self.layer4 = stage(Bottleneck, 3, 1024, 512, 2, expansion=4)
        self.linear = nn.Linear(2048, classes)
        start(self)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))


def stage(
    block: type[nn.Module], count: int, cin: int, channels: int, stride: int, expansion: int = 1
) -> nn.Sequential:
    """``count`` blocks; the first has the stride."""
    first = block(cin, channels, stride)
    return nn.Sequential(first, *(block(expansion * channels, channels, 1) for _ in range(count - 1)))
