"""VGGs with batch norm (Simonyan and Zisserman 2015), with the parameter names of RepDistiller's models/vgg.py.

``block0`` .. ``block4`` are the stages: 3x3 convolutions, each with batch norm and ReLU.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from .initial import start

# convolutions in each of the five stages, by the number of layers
COUNTS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """(B, C, H, W) to (B, classes). The map is halved after each stage but the last, and after the fourth only for
    images of 64 x 64."""

    def __init__(self, depth: int, in_channels: int, classes: int) -> None:
        super().__init__()
        before = (in_channels, *WIDTHS)
        for i, count in enumerate(COUNTS[depth]):
            self.add_module(f"block{i}", _stage(count, before[i], WIDTHS[i]))
        self.classifier = nn.Linear(WIDTHS[-1], classes)
        start(self, head=0.01)

    def forward(self, x: Tensor) -> Tensor:
        halved = 4 if x.shape[2] == 64 else 3
        for i in range(len(WIDTHS)):
            x = self.get_submodule(f"block{i}")(x)
            if i < halved:
                x = max_pool2d(x, 2)
        return self.classifier(x.mean((2, 3)))


def _stage(count: int, cin: int, cout: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [nn.Conv2d(cout if i else cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU()]
    return nn.Sequential(*layers)
