"""ShuffleNets for 32 x 32 images (Zhang et al. 2018, Ma et al. 2018), with the parameter names of RepDistiller's
models/ShuffleNetv1.py and ShuffleNetv2.py. ``layer1`` .. ``layer3`` are the stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels of all groups in turn."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _conv(cin: int, cout: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 1, groups=groups, bias=False)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)


class GroupedBottleneck(nn.Module):
    """1x1 and 3x3 convolutions in groups; with a stride of 2 beside the pooled input, else added to it."""

    def __init__(self, cin: int, cout: int, stride: int, groups: int) -> None:
        super().__init__()
        middle, self.stride = cout // 4, stride
        self.groups = 1 if cin == 24 else groups  # the image's few channels are not split
        self.conv1, self.bn1 = _conv(cin, middle, self.groups), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = _depthwise(middle, stride), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = _conv(middle, cout, groups), nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle(torch.relu(self.bn1(self.conv1(x))), self.groups)
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return torch.relu(torch.cat([out, avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else out + x)


class ShuffleNetV1(nn.Module):
    """(B, C, H, W) to (B, classes); groups of 3."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, 24), nn.BatchNorm2d(24)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                GroupedBottleneck(cin, cout - cin, 2, 3), *(GroupedBottleneck(cout, cout, 1, 3) for _ in range(count))
            )
            for cin, cout, count in ((24, 240, 3), (240, 480, 7), (480, 960, 3))
        )
        self.linear = nn.Linear(960, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(out.mean((2, 3)))


class SplitBlock(nn.Module):
    """Three convolutions of one half of the channels; the other half passes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = _conv(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _depthwise(half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        passed, out = x.chunk(2, 1)
        out = torch.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        return shuffle(torch.cat([passed, torch.relu(self.bn3(self.conv3(out)))], 1), 2)


class DownBlock(nn.Module):
    """Two branches with a stride of 2, side by side."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        half = cout // 2
        self.conv1, self.bn1 = _depthwise(cin, 2), nn.BatchNorm2d(cin)
        self.conv2, self.bn2 = _conv(cin, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(cin, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _depthwise(half, 2), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _conv(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = torch.relu(self.bn3(self.conv3(x)))
        right = torch.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return shuffle(torch.cat([left, right], 1), 2)


class ShuffleNetV2(nn.Module):
    """(B, C, H, W) to (B, classes)."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, 24), nn.BatchNorm2d(24)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(DownBlock(cin, cout), *(SplitBlock(cout) for _ in range(count)))
            for cin, cout, count in ((24, 116, 3), (116, 232, 7), (232, 464, 3))
        )
        self.conv2, self.bn2 = _conv(464, 1024), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(torch.relu(self.bn2(self.conv2(out))).mean((2, 3)))
