"""Which axis of a feature is which, and what is refused where that is not clear."""

from __future__ import annotations

import pytest
import torch
from checking import DEVICE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_tools import images

from kdkernels.training import Distillation, fit
from kdkernels.training.adapters import alike
from kdkernels.training.layouts import channels_last, token_map


def test_maps_of_tokens_leave_the_special_ones_out() -> None:
    x = torch.arange(10.0).view(1, 5, 2)
    assert token_map(x, (8, 8)).tolist() == [[[[2.0, 4.0], [6.0, 8.0]], [[3.0, 5.0], [7.0, 9.0]]]]
    wide = torch.rand(2, 2 + 3 * 5, 4)  # of images of 3 x 5 patches
    assert torch.equal(token_map(wide, (48, 80)), wide[:, 2:].transpose(1, 2).view(2, 4, 3, 5))
    last = torch.rand(2, 4, 4, 3)
    assert torch.equal(token_map(last, None), last.permute(0, 3, 1, 2))
    assert token_map(last.permute(0, 3, 1, 2), (8, 8)).shape == (2, 3, 4, 4)
    rows = torch.zeros(2, 3), torch.zeros(2, 4)
    assert [a is b for a, b in zip(alike(["map", "pool"], *rows, None), rows, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("tokens", "size", "message"),
    [
        (5, None, r"the 5 tokens of \(2, 5, 4\) are no map of what is no image: name other layers"),
        (2, (32, 96), "no map of images of 32 x 96"),
        (25, (32, 32 * 11), "no map of images of 32 x 352"),  # 1 x 11 would leave 14 out
    ],
)
def test_tokens_without_a_map_are_refused(tokens: int, size: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_map(torch.rand(2, tokens, 4), size)


@pytest.mark.parametrize(
    ("shape", "size", "last"),
    [
        ((2, 7, 7, 96), (224, 224), True),
        ((2, 96, 7, 7), (224, 224), False),
        ((2, 7, 7, 7), (224, 224), False),  # both fit: first, as everywhere in PyTorch
        ((2, 7, 9, 96), (224, 280), True),  # 224 / 32, 280 / 32 rounded up
        ((2, 96, 7, 9), (224, 280), False),
        ((2, 50, 7), (224, 224), False),
        ((2, 12, 5, 9), (224, 224), False),  # neither fits
    ],
)
def test_channels_are_last_where_nothing_else_fits_the_images(
    shape: tuple[int, ...], size: tuple[int, int], last: bool
) -> None:
    assert channels_last(torch.empty(shape), size) == last


class Net(nn.Module):
    """Its stages return maps, with channels last while ``last`` is True, as Swin's."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.last = True
        self.layer1, self.layer2 = Stage(self, 1, channels[0]), Stage(self, channels[0], channels[1])
        self.fc = nn.Linear(channels[1], 4)
        self.to(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(x.movedim(1, -1) if self.last else x))
        return self.fc(x.mean((1, 2) if self.last else (2, 3)))


class Stage(nn.Conv2d):
    def __init__(self, net: Net, cin: int, cout: int) -> None:
        super().__init__(cin, cout, 3, 2, 1)
        self.last = lambda: net.last

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1) if self.last() else super().forward(x)


@pytest.mark.parametrize("method", ["amd", "at", "nst", "ickd"])
def test_maps_with_channels_last_are_refused_or_turned(method: str) -> None:
    teacher, student, (x, y) = Net(6, 7), Net(3, 5), images()

    def terms(**options: object) -> dict[str, Tensor]:
        torch.manual_seed(0)  # of ICKD's projection
        return Distillation(teacher, student, method, example=x, **options)(x, y).terms

    message = r"features must be maps \(N, C, H, W\), and .* are maps with channels last: adapt=\['map', 'pool'\]"
    with pytest.raises(ValueError, match=message):
        terms()
    turned = terms(adapt="map")
    teacher.last = student.last = False
    torch.testing.assert_close(turned, terms())


class Tokens(nn.Module):
    """(B, 1, 8, 8) to 16 tokens of 2 x 2 pixels, and logits of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2, self.fc = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.to(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(x.reshape(len(x), 16, 4))).mean(1))


@pytest.mark.parametrize("method", ["amd", "at", "nst", "ickd"])
def test_tokens_are_refused_where_maps_are_needed(method: str) -> None:
    x, y = images()
    with pytest.raises(ValueError, match=r"the student's features .*\(\d, 16, 6\) are tokens: adapt=\['map', 'pool'\]"):
        Distillation(Net(6, 7), Tokens(), method)(x, y)
    with pytest.raises(ValueError, match=r"\(\d, 16, 6\) are tokens: what is no image has no maps: take a method that"):
        Distillation(Tokens(), Tokens(), method)(x.flatten(1), y)


def test_corsd_refuses_tokens() -> None:
    x, y = images()
    message = r"CORSD: the student's features must be maps .*\(\d+, 16, 6\) are tokens: adapt='map' makes such of them"
    with pytest.raises(ValueError, match=message):
        Distillation(None, Tokens(), "corsd", example=x)
    with pytest.raises(ValueError, match=message):
        fit(Distillation(None, Tokens(), "corsd"), DataLoader(TensorDataset(x.cpu(), y.cpu()), 6), epochs=1)
