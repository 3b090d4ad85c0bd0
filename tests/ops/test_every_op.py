"""torch.library.opcheck, dynamic shapes included, on every op that a loss calls and with what it is called with."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from checking import DEVICE, opcheck
from every_loss import CLASSES, LOSSES, maps
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels

# what losses over ranks are made of: opcheck is in the tests of those ops
OF_PARTS = {"grams", "products", "relation_loss", "relation_measures", "sp_from_grams"}
REGISTERED = {name for name in dir(torch.ops.kdkernels) if hasattr(getattr(torch.ops.kdkernels, name), "default")}


class Recorder(TorchDispatchMode):
    """The first call of each op of kdkernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        space, _, name = func._schema.name.partition("::")
        if space == "kdkernels":
            self.calls.setdefault(name, args)
        return func(*args, **(kwargs or {}))


@cache
def calls() -> dict[str, tuple[Any, ...]]:
    s, t = (torch.randn(6, CLASSES, device=DEVICE).requires_grad_() for _ in range(2))
    with Recorder() as recorder:
        for loss in LOSSES.values():
            loss(s, t.detach()).backward()
        for made in (
            kdkernels.energy(maps(s)),
            kdkernels.gram(s),
            kdkernels.gram(s, t),
            kdkernels.cosine_similarity(s, t),
            kdkernels.kd_loss(s, t.detach(), reduction="none"),
            kdkernels.linear_kd_loss(kdkernels.Head(s, t), kdkernels.Head(s.detach(), t.detach()), reduction="none"),
        ):
            made.backward(torch.randn_like(made), retain_graph=True)
        # what was handed on in the last backward pass is computed where another one follows
        kdkernels.ickd_loss(maps(s), maps(t.detach())).backward(retain_graph=True)
    return recorder.calls


def leaves(value: Any, gradient: bool) -> Any:
    """The argument as a caller would give it, a tensor or a list of them with a gradient or without."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return [leaves(x, gradient) for x in value]
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone(memory_format=torch.preserve_format)
    return copy.requires_grad_(gradient and copy.is_floating_point())


def test_every_op_is_called() -> None:
    called = set(calls()) | OF_PARTS
    assert called | {f"{name}_traced" for name in called} >= REGISTERED
    assert len(REGISTERED) > 40


@pytest.mark.parametrize("name", sorted(REGISTERED - OF_PARTS))
def test_opcheck(name: str) -> None:
    first, *rest = calls()[name.removesuffix("_traced")]
    op = getattr(torch.ops.kdkernels, name).default
    opcheck(op, (leaves(first, name.endswith("_traced")), *(leaves(x, False) for x in rest)))
