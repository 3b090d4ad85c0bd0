"""The one table of tolerances, and how a result is held against the definition in fp64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kdkernels
from kdkernels.ops import backend as backends
from kdkernels.ops.angular_margin import definition as angular_definition
from kdkernels.ops.angular_margin import op as angular_op
from kdkernels.ops.channel_gram import definition as channel_definition
from kdkernels.ops.channel_gram import op as channel_op
from kdkernels.ops.checks import compute_dtype
from kdkernels.ops.correlation import definition as correlation_definition
from kdkernels.ops.correlation import op as correlation_op
from kdkernels.ops.energy import definition as energy_definition
from kdkernels.ops.energy import op as energy_op
from kdkernels.ops.gram import definition as gram_definition
from kdkernels.ops.gram import op as gram_op
from kdkernels.ops.linear_kd import definition as linear_definition
from kdkernels.ops.linear_kd import op as linear_op
from kdkernels.ops.multi_level import definition as multi_level_definition
from kdkernels.ops.multi_level import op as multi_level_op
from kdkernels.ops.neighbour_correlation import definition as neighbour_definition
from kdkernels.ops.neighbour_correlation import op as neighbour_op
from kdkernels.ops.nkd import definition as nkd_definition
from kdkernels.ops.nkd import op as nkd_op
from kdkernels.ops.relation import definition as relation_definition
from kdkernels.ops.relation import op as relation_op
from kdkernels.ops.softmax_kl import definition as softmax_definition
from kdkernels.ops.softmax_kl import op as softmax_op
from kdkernels.ops.softmax_pearson import definition as pearson_definition
from kdkernels.ops.softmax_pearson import op as pearson_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)


class Tolerance(NamedTuple):
    loss: float  # relative
    gradient: float  # relative norm, beside one rounding to the gradient's dtype


TOLERANCES = {torch.float64: Tolerance(1e-11, 1e-11)} | dict.fromkeys((torch.float32, *HALF), Tolerance(1e-5, 1e-5))


@contextmanager
def by_definition() -> Iterator[None]:
    """Every op by its definition.py, under autograd, in the precision of its tensors. Whoever calls an op meets it."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax_op, "_op", softmax_definition.softmax_kl)
        patch.setattr(gram_op, "_sp_op", gram_definition.sp_gram)
        patch.setattr(gram_op, "_cosine_op", lambda x: gram_definition.cosine_similarity(*x))
        patch.setattr(gram_op, "_own_op", lambda x: gram_definition.gram(x.q.to(compute_dtype(x.q))))
        patch.setattr(gram_op, "_pair_op", lambda x: gram_definition.products(*x))
        patch.setattr(relation_op, "_op", relation_definition.relation)
        patch.setattr(energy_op, "_energy_op", energy_definition.energy)
        patch.setattr(energy_op, "_attention_op", energy_definition.attention)
        patch.setattr(channel_op, "_distance_op", channel_definition.channel_distance)
        patch.setattr(angular_op, "_op", angular_definition.angular_margin)
        patch.setattr(correlation_op, "_op", correlation_definition.correlation)
        patch.setattr(linear_op, "_op", linear_definition.linear_kd)
        patch.setattr(neighbour_op, "_op", neighbour_definition.neighbour_correlation)
        patch.setattr(nkd_op, "_op", nkd_definition.nkd)
        patch.setattr(pearson_op, "_op", pearson_definition.softmax_pearson)
        patch.setattr(multi_level_op, "_op", multi_level_definition.multi_level)
        yield


def backends_under_test() -> list[str]:
    """The backends that run on this machine's device. The interpreter is slow and runs in a process of its own."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ["triton"]
    if os.environ.get("KDKERNELS_TEST_CUDA"):
        return ["native"]
    names = ["reference"]
    probe = torch.ones(2, 2, 2, 2, device=DEVICE)
    for name in ("native", "triton"):
        if all(backends.why_not(op, name, probe) is None for op in backends.OPS):
            names.append(name)
    return names


def wave(shape: Sequence[int], seed: float, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The inputs of golden.json: element n is scale * sin(seed + 1.7 n + 0.3 sin(0.013 n))."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(seed + 1.7 * n + 0.3 * torch.sin(0.013 * n))).view(*shape).to(DEVICE, dtype)


def gradients(loss: Tensor, inputs: Sequence[Tensor], upstream: float | Tensor = 1.0) -> list[Tensor]:
    upstream = torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand_as(loss)
    return list(torch.autograd.grad(loss, inputs, upstream, allow_unused=False))


def rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of ``dtype`` around x: what one rounding may cost."""
    info = torch.finfo(dtype)
    return torch.clamp(x.abs() * info.eps, min=info.smallest_normal * info.eps) / 2


def check_close(what: str, actual: Tensor, expected: Tensor, relative: float, dtype: torch.dtype | None = None) -> None:
    """||actual - expected|| <= relative * ||expected|| (+ one rounding to dtype), in fp64; NaN and inf must agree."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(expected)), f"{what}: {kind.__name__} differs"
    finite = expected.isfinite()
    actual, expected = actual[finite], expected[finite]
    allowed = relative * expected.norm() + 1e-30
    if dtype in HALF:
        allowed = allowed + rounding(expected, dtype).norm()
    error = (actual - expected).norm()
    assert error <= allowed, f"{what}: error {error:.3e} is over {allowed:.3e} (norm {expected.norm():.3e})"


def refused(function: Callable[..., object], *tensors: Tensor) -> bool:
    """Whether the backend in force states that it has no float64; then it must say so when it is asked by name."""
    name = backends.requested()
    if name == "auto" or tensors[0].dtype != torch.float64:
        return False
    if not any(backends.why_not(op, name, *tensors) for op in backends.OPS):
        return False
    with pytest.raises(kdkernels.BackendError, match="float64"):
        function(*tensors)
    return True


def check_op(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    constants: Sequence[Tensor] = (),
    upstream: float = 3.7,
) -> tuple[Tensor, list[Tensor]]:
    """function(*inputs, *constants) and its gradients in the backend in force, against the definition in fp64.

    The upstream gradient is not 1 and, for a loss of several values, not the same everywhere.
    """
    inputs = [x.detach().requires_grad_() for x in inputs]
    if refused(function, *inputs, *constants):
        with kdkernels.use_backend("reference"):
            return check_op(function, inputs, constants=constants, upstream=upstream)
    loss = function(*inputs, *constants)
    weights = upstream * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    actual = gradients(loss, inputs, weights)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with by_definition():
        expected_loss = function(*exact, *(c.double() if c.is_floating_point() else c for c in constants))
        expected = gradients(expected_loss, exact, weights.double())
    dtype = inputs[0].dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_close("loss", loss, expected_loss, TOLERANCES[dtype].loss)
    for i, (x, a, e) in enumerate(zip(inputs, actual, expected, strict=True)):
        assert a.dtype == x.dtype
        assert a.shape == x.shape
        check_close(f"gradient {i}", a, e, TOLERANCES[dtype].gradient, dtype)
    return loss, actual


def check_contract(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Backward twice, no second derivative, nothing recorded under no_grad, autocast and repetition change nothing."""
    x = x.detach().requires_grad_()
    loss = function(x)
    first = torch.autograd.grad(loss.sum() * 3, x, retain_graph=True)[0]
    second = torch.autograd.grad(loss.sum() * 3, x, retain_graph=True)[0]
    assert torch.equal(first, second)
    again = function(x)
    assert torch.equal(again, loss)
    assert torch.equal(torch.autograd.grad(again.sum() * 3, x)[0], first)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss.sum(), x, create_graph=True)
    with torch.no_grad():
        silent = function(x)
    assert silent.grad_fn is None
    assert torch.equal(silent, loss)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        cast = function(x)
    assert cast.dtype == loss.dtype
    assert torch.equal(cast, loss)
    assert torch.equal(torch.autograd.grad(cast.sum() * 3, x)[0], first)


def check_compiled(function: Callable[[Tensor], Tensor], x: Tensor, compiler: str = "inductor") -> None:
    """torch.compile(fullgraph=True), forward and backward, gives what eager gives.

    Inductor makes C++ of what stands around an op, and compiles it for seconds: give it ops alone, and losses to
    "aot_eager", which traces the same graphs. test_compiled.py has whole losses under Inductor.
    """
    x = x.detach().requires_grad_()
    torch._dynamo.reset()
    eager, compiled = function(x), torch.compile(function, fullgraph=True, backend=compiler)(x)
    check_close("compiled loss", compiled, eager, 1e-6)
    check_close("compiled gradient", gradients(compiled, [x], 3.0)[0], gradients(eager, [x], 3.0)[0], 1e-6)
