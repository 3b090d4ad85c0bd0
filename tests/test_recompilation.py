"""Batch sizes, weights and options that change while a network trains: two compilations at most, for every loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.backends.registry
from checking import DEVICE, check_close, gradients
from every_loss import CLASSES, LOSSES, Loss, corsd, labels, linear, maps
from torch import Tensor

import kdkernels
from kdkernels import stkd_loss

pytestmark = pytest.mark.slow

SIZES = (8, 4, 6, 10, 12, 16, 24, 3, 5, 7, 9, 11)  # of the batch; all but the first are odd, even and prime


class Counter:
    """A backend of torch.compile that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def check(loss: Loss, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(lambda s, t, w: w * loss(s, t), backend=counter, fullgraph=True, dynamic=dynamic)
    for step, rows in enumerate(SIZES):
        s, t = torch.randn(rows, CLASSES, device=DEVICE, requires_grad=True), torch.randn(rows, CLASSES, device=DEVICE)
        weight = 0.9 - 0.07 * step
        actual, expected = compiled(s, t, weight), weight * loss(s, t)
        check_close("loss", actual, expected, 1e-6)
        check_close("gradient", gradients(actual, [s])[0], gradients(expected, [s])[0], 1e-6)
    assert 1 <= counter.graphs <= 2


@pytest.mark.parametrize("name", list(LOSSES))
def test_twelve_sizes_and_weights_take_two_compilations(name: str) -> None:
    check(LOSSES[name], dynamic=None)


@pytest.mark.parametrize("name", ["stkd mixed", "sp", "amd area", "rkd", "linear_kd"])
def test_what_is_dynamic_from_the_start(name: str) -> None:
    check(LOSSES[name], dynamic=True)


# every option that is a number, of a w that falls from 0.9 to 0.1
TWELVE = tuple(0.9 - 0.07 * i for i in range(12))
SCHEDULED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kd": lambda s, t, w: kdkernels.kd_loss(s, t, temperature=w),
    "kd beta": lambda s, t, w: kdkernels.kd_loss(s, t, divergence="jsd", beta=w, scale_by_t2=False),
    "stkd": lambda s, t, w: stkd_loss(s, t, labels(s), temperature=3 + w, ce_weight=w, kd_weight=1 - w),
    "dkd": lambda s, t, w: stkd_loss(s, t, labels(s), decouple=(w, w), label_smoothing=w, temperature=w),
    "sp": lambda s, t, w: kdkernels.sp_loss([s, s * s], [t, t], layer_weights=[w, 1 - w]),
    "amd": lambda s, t, w: kdkernels.amd_loss(maps(s), maps(t), margin=1 + w, sharpness=64 * w, local_weight=w),
    "correlation": lambda s, t, w: kdkernels.correlation_loss(s, t, views=1, temperature=w),
    "supervised": lambda s, t, w: kdkernels.supervised_contrastive_loss(s, t, labels(s), temperature=w),
    "mlkd": lambda s, t, w: kdkernels.mlkd_loss(
        s, t, labels(s), views=1, correlation_weight=w, supervised_weight=w, alignment_weight=w, temperature=w
    ),
    "corsd": lambda s, t, w: corsd(s, t, temperature=w, margin=w, triplet_weight=w, relation_weight=w),
    "corsd terms": lambda s, t, w: corsd(
        s, t, ce_pos_weight=w, kl_pos_weight=1 - w, ce_neg_weight=w * w, kl_neg_weight=w
    ),
    "rkd": lambda s, t, w: kdkernels.rkd_loss(s, t, distance_weight=w, angle_weight=2 * w, eps=1e-6 * w),
    "irg": lambda s, t, w: kdkernels.irg_loss(s, t, eps=w),
    "pkt": lambda s, t, w: kdkernels.pkt_loss(s, t, eps=w),
    "cc": lambda s, t, w: kdkernels.cc_loss(s, t, gamma=w),
    "at": lambda s, t, w: kdkernels.at_loss(maps(s), maps(t), p=2 + w, layer_weights=[w]),
    "ft": lambda s, t, w: kdkernels.ft_loss(maps(s), maps(t), layer_weights=[w]),
    "nst": lambda s, t, w: kdkernels.nst_loss(maps(s), maps(t), layer_weights=[w]),
    "fsp": lambda s, t, w: kdkernels.fsp_loss([maps(s)] * 3, [maps(t)] * 3, layer_weights=[w, 1 - w]),
    "ickd": lambda s, t, w: kdkernels.ickd_loss(maps(s), maps(t), layer_weights=[w]),
    "nkd": lambda s, t, w: kdkernels.nkd_loss(s, t, labels(s), temperature=2 * w, gamma=w),
    "dist": lambda s, t, w: kdkernels.dist_loss(s, t, temperature=2 * w, beta=w, gamma=1 - w),
    "mlld": lambda s, t, w: kdkernels.mlld_loss(
        s, t, s.flip(0), t.flip(0), temperatures=[2.0, 3 + w], strong_temperatures=[2.0], batch_weight=w, class_weight=w
    ),
    "cwd": lambda s, t, w: kdkernels.cwd_loss(maps(s), maps(t), temperature=w),
    "linear_kd": lambda s, t, w: linear(s, t, temperature=w, kd_weight=w),
    "linear_kd rows": lambda s, t, w: linear(s, t, temperature=w, reduction="none").mean(),
}


# where a number that a loss compares is computed from w, which torch 2.11 makes a constant
COMPUTED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kd computed": lambda s, t, w: kdkernels.kd_loss(s, t, temperature=5 * w),
    "dkd computed": lambda s, t, w: stkd_loss(s, t, labels(s), decouple=(w, 8 * w), kd_weight=w),
    "ft computed": lambda s, t, w: kdkernels.ft_loss(maps(s), maps(t), p1=2 + w),
}


def check_schedule(name: str, inner: str, values: Sequence[float] = TWELVE) -> None:
    torch._dynamo.reset()
    loss, graphs = (SCHEDULED | COMPUTED)[name], []
    compiler = torch._dynamo.backends.registry.lookup_backend(inner)

    def count(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(graph)
        return compiler(graph, inputs)

    compiled = torch.compile(loss, backend=count, fullgraph=True)
    s, t = torch.randn(8, CLASSES, device=DEVICE, requires_grad=True), torch.randn(8, CLASSES, device=DEVICE)
    for value in values:
        actual, expected = compiled(s, t, value), loss(s, t, value)
        check_close("loss", actual, expected, 1e-6)
        check_close("gradient", gradients(3 * actual, [s])[0], gradients(3 * expected, [s])[0], 1e-6)
    assert 1 <= len(graphs) <= 2


@pytest.mark.parametrize("name", list(SCHEDULED))
def test_twelve_values_of_every_option_take_two_compilations(name: str) -> None:
    check_schedule(name, "aot_eager")


@pytest.mark.skipif(torch.torch_version.TorchVersion(torch.__version__) < "2.13", reason="Dynamo makes it a constant")
@pytest.mark.parametrize("name", list(COMPUTED))
def test_numbers_computed_from_it_stay_symbolic(name: str) -> None:
    check_schedule(name, "aot_eager")


def test_integers_do_as_well() -> None:
    check_schedule("kd", "aot_eager", [1, 2, 3, 4, 5, 7, 9, 12])


@pytest.mark.parametrize("name", ["dkd", "at", "linear_kd rows"])
def test_inductor_keeps_them_symbolic(name: str) -> None:
    check_schedule(name, "inductor")
