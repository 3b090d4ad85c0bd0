"""Every backend's module has the functions of its op's Protocol, with the same parameters."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import pytest

from kdkernels.ops import backend
from kdkernels.ops.angular_margin.op import AngularMargin
from kdkernels.ops.channel_gram.op import ChannelDistance
from kdkernels.ops.energy.op import Energy
from kdkernels.ops.gram.op import Gram
from kdkernels.ops.multi_level.op import MultiLevel
from kdkernels.ops.neighbour_correlation.op import NeighbourCorrelation
from kdkernels.ops.nkd.op import NKD
from kdkernels.ops.relation.op import Relation
from kdkernels.ops.softmax_kl.op import SoftmaxKL
from kdkernels.ops.softmax_pearson.op import SoftmaxPearson

PROTOCOLS = {"softmax_kl": SoftmaxKL, "gram": Gram, "energy": Energy, "angular_margin": AngularMargin}
CPU_PROTOCOLS = {
    "relation": Relation,
    "channel_gram": ChannelDistance,
    "neighbour_correlation": NeighbourCorrelation,
    "nkd": NKD,
    "softmax_pearson": SoftmaxPearson,
    "multi_level": MultiLevel,
}
ALL = PROTOCOLS | CPU_PROTOCOLS
METHODS = [
    (op, method)
    for op, protocol in ALL.items()
    for method, value in vars(protocol).items()
    if inspect.isfunction(value) and not method.startswith("_")
]


def implementation(op: str, name: str) -> ModuleType:
    if name == "triton":
        pytest.importorskip("triton")
    return importlib.import_module(f"kdkernels.ops.{op}.{backend.MODULES[name]}")


def test_every_op_has_its_protocol() -> None:
    assert set(PROTOCOLS) == set(backend.OPS)
    assert set(CPU_PROTOCOLS) == set(backend.CPU_OPS)
    assert len(METHODS) == 3 + 8 + 4 + 2 + 4 + 2 + 4 * 3


@pytest.mark.parametrize(
    ("op", "method", "name"),
    [(*m, name) for m in METHODS for name in backend.MODULES if name != "triton" or m[0] in PROTOCOLS],
)
def test_a_backend_has_the_method(op: str, method: str, name: str) -> None:
    function = getattr(implementation(op, name), method)
    promised = list(inspect.signature(getattr(ALL[op], method)).parameters.values())[1:]  # without self
    found = list(inspect.signature(function).parameters.values())
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in promised]
