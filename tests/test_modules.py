"""What programs do with modules and losses: copy, pickle and checkpoint them, and export a model with its loss."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from checking import DEVICE, check_close, gradients
from every_loss import CLASSES, LOSSES, maps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kdkernels
from kdkernels import Head

SKELETONS = {  # what needs arguments
    "CORSDLoss": lambda: kdkernels.CORSDLoss((3, 3), CLASSES),
    "CorrelationLoss": lambda: kdkernels.CorrelationLoss(views=2),
    "MLKDLoss": lambda: kdkernels.MLKDLoss(CLASSES, CLASSES, embedding_dim=4, views=2),
}
PUBLIC = {name: getattr(kdkernels, name) for name in kdkernels.__all__}
MODULES = [name for name, kind in PUBLIC.items() if inspect.isclass(kind) and issubclass(kind, nn.Module)]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def call(module: nn.Module, name: str, s: Tensor, t: Tensor) -> Tensor:
    y = torch.arange(len(s), device=DEVICE) % 3
    if name == "CORSDLoss":
        return module([maps(s), maps(s)], y[::3], y[1::3])
    if name == "LinearKDLoss":
        return module(Head(s, t), Head(t, s.detach()))
    if name == "FSPLoss":
        return module([maps(s)] * 2, [maps(t)] * 2)
    of_maps = {"AMDLoss", "ATLoss", "CWDLoss", "FTLoss", "ICKDLoss", "NSTLoss"}
    tensors = (maps(s), maps(t)) if name in of_maps else (s, t)
    labels = {"STKDLoss", "NKDLoss", "SupervisedContrastiveLoss", "MLKDLoss"}
    return module(*tensors, y) if name in labels else module(*tensors)


@pytest.mark.parametrize("name", MODULES)
def test_copies_of_a_module_compute_the_same(name: str) -> None:
    """By deepcopy, pickle and torch.save, before and after a call; what they hold is their own."""
    module = SKELETONS.get(name, PUBLIC[name])().to(DEVICE).eval()
    s, t = randn(6, CLASSES).requires_grad_(), randn(6, CLASSES)
    untouched = copy.deepcopy(module)
    expected = call(module, name, s, t)
    (gradient,) = torch.autograd.grad(expected, s)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [untouched, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for other in [*copies, torch.load(buffer, weights_only=False)]:
        assert repr(other) == repr(module)
        assert other.state_dict().keys() == module.state_dict().keys()
        assert not {x.data_ptr() for x in other.parameters()} & {x.data_ptr() for x in module.parameters()}
        value = call(other, name, s, t)
        assert torch.equal(value, expected)
        assert torch.equal(torch.autograd.grad(value, s)[0], gradient)


@pytest.mark.parametrize("name", list(LOSSES))
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    """The network and its loss, computed again in the backward pass."""
    network, x, t = nn.Linear(5, CLASSES).to(DEVICE), randn(6, 5), randn(6, CLASSES)
    results = []
    for whole in (lambda f: f(), lambda f: checkpoint(f, use_reentrant=False)):
        value = whole(lambda: LOSSES[name](network(x), t))
        results.append([value, *gradients(value, list(network.parameters()), 3.0)])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


class Distilled(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.network, self.name = nn.Linear(5, CLASSES), name

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return LOSSES[self.name](self.network(x), t)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "linear_kd"])
def test_export_of_a_model_with_its_loss(name: str) -> None:
    """One program for any batch."""
    model = Distilled(name).to(DEVICE)
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(model, (randn(6, 5), randn(6, CLASSES)), dynamic_shapes=(batch, batch)).module()
    for rows in (9, 2):
        x, t = randn(rows, 5), randn(rows, CLASSES)
        check_close("loss", program(x, t), model(x, t), 1e-6)
