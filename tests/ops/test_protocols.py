"""Every backend's module has the functions of its op's Protocol, with the same parameters."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import pytest

from kdkernels.ops import backend
from kdkernels.ops.angular_margin.op import AngularMargin
from kdkernels.ops.energy.op import Energy
from kdkernels.ops.gram.op import Gram
from kdkernels.ops.softmax_kl.op import SoftmaxKL

PROTOCOLS = {"softmax_kl": SoftmaxKL, "gram": Gram, "energy": Energy, "angular_margin": AngularMargin}
METHODS = [
    (op, method)
    for op, protocol in PROTOCOLS.items()
    for method, value in vars(protocol).items()
    if inspect.isfunction(value) and not method.startswith("_")
]


def implementation(op: str, name: str) -> ModuleType:
    if name == "triton":
        pytest.importorskip("triton")
    return importlib.import_module(f"kdkernels.ops.{op}.{backend.MODULES[name]}")


def test_every_op_has_its_protocol() -> None:
    assert set(PROTOCOLS) == set(backend.OPS)
    assert len(METHODS) == 3 + 8 + 4 + 2


@pytest.mark.parametrize("name", list(backend.MODULES))
@pytest.mark.parametrize(("op", "method"), METHODS)
def test_a_backend_has_the_method(op: str, method: str, name: str) -> None:
    function = getattr(implementation(op, name), method)
    promised = list(inspect.signature(getattr(PROTOCOLS[op], method)).parameters.values())[1:]  # without self
    found = list(inspect.signature(function).parameters.values())
    assert [(p.name, p.kind) for p in found] == [(p.name, p.kind) for p in promised]
    assert all(p.default is p.empty for p in found)
