"""The one table of tolerances, and how a result is held against the definition in fp64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kdkernels
from benchmarks.definitions import by_definition
from kdkernels.ops import backend as backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # a thousand times as slow: fewer repetitions


class Tolerance(NamedTuple):
    loss: float  # relative
    gradient: float  # relative norm, beside one rounding to the gradient's dtype


TOLERANCES = {torch.float64: Tolerance(1e-11, 1e-11)} | dict.fromkeys((torch.float32, *HALF), Tolerance(1e-5, 1e-5))


def opcheck(op: torch._ops.OpOverload, args: tuple[object, ...]) -> None:
    """torch.library.opcheck. Of kernels that a simulator runs it asks what depends on the backend."""
    simulated = INTERPRETED or os.environ.get("KDKERNELS_TEST_CUDA")
    what = {"test_utils": ("test_schema", "test_faketensor")} if simulated else {}
    torch.library.opcheck(op, args, **what)


def backends_under_test() -> list[str]:
    """The backends that run on this machine's device. The interpreter is slow and runs in a process of its own."""
    if INTERPRETED:
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
