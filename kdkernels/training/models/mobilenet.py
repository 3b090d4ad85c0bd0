"""MobileNetV2 of half width for 32 x 32 images (Sandler et al. 2018), with the parameter names of RepDistiller's
models/mobilenetv2.py.

The children of ``blocks`` are the stages; RepDistiller compares blocks.1, blocks.2, blocks.4 and blocks.6.
"""

from __future__ import annotations

from torch import Tensor, nn

from .initial import start

EXPANSION = 6
# channels at full width, blocks, stride of the first
STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


def conv_bn_relu(cin: int, cout: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(cin, cout, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(cout), nn.ReLU()]


class InvertedResidual(nn.Module):
    """Wide between two 1x1 convolutions, a 3x3 convolution for each channel there; added to its input if that fits."""

    def __init__(self, cin: int, cout: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = cin * expansion
        self.conv = nn.Sequential(
            *conv_bn_relu(cin, wide, 1),
            *conv_bn_relu(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        )
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """(B, C, H, W) to (B, classes)."""

    def __init__(self, in_channels: int, classes: int, width: float = 0.5) -> None:
        super().__init__()
        cin = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn_relu(in_channels, cin, 3, 2))
        self.blocks = nn.Sequential()
        for channels, count, stride in STAGES:
            expansion = EXPANSION if len(self.blocks) else 1
            cout = int(channels * width)
            sizes = zip([cin] + [cout] * (count - 1), [stride] + [1] * (count - 1), strict=True)
            self.blocks.append(nn.Sequential(*(InvertedResidual(c, cout, s, expansion) for c, s in sizes)))
            cin = cout
        self.conv2 = nn.Sequential(*conv_bn_relu(cin, 1280, 1))
        self.classifier = nn.Sequential(nn.Linear(1280, classes))
        start(self, head=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.conv2(self.blocks(self.conv1(x))).mean((2, 3)))
