"""What the tests of the trainer share: small networks, batches and loaders."""

from __future__ import annotations

import torch
from checking import DEVICE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.training import (
    METHODS,
    Distillation,
    data,
)
from kdkernels.training.models import ConvNet, small_student, small_teacher


def network(*channels: int) -> ConvNet:
    return ConvNet(1, 4, channels or (3, 4, 5)).to(DEVICE)


def images(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8, device=DEVICE), torch.arange(n, device=DEVICE) % 4


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def loaders(n: int = 96) -> tuple[DataLoader, DataLoader]:
    split = data.digits()
    small = TensorDataset(*(x[:n] for x in split.train.tensors))
    return data.loader(small, 32, train=True), data.loader(split.test, 500, train=False)


def make(method: str = "kd", seed: int = 0) -> Distillation:
    torch.manual_seed(seed)
    teacher, student = small_teacher(1, 10), small_student(1, 10)
    return Distillation(teacher if METHODS[method].needs_teacher else None, student, method)


def plain(width: int, seed: int) -> nn.Module:
    """A network without batch norm, which would see the micro-batches: its stages are named as usual."""
    torch.manual_seed(seed)
    layers = {
        "layer1": nn.Linear(64, width),
        "act": nn.Tanh(),
        "layer2": nn.Linear(width, width),
        "fc": nn.Linear(width, 4),
    }
    model = nn.Sequential(nn.Flatten())
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model.to(DEVICE).double()
