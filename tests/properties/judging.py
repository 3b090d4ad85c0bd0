"""How a result is held against the definition in fp64, where inputs may be anything.

What a formula makes of one rounding of its inputs cannot be blamed on who computes it. So the allowed error of a row is

    base |exact| + ULPS (change + ulp natural + fp64's ulp own)

with the base of all other tests (checking.py), and the change of the definition if every input moves by one ulp of the
arithmetic, which is computed only where the base is exceeded. ``natural`` is the size of what a gradient is the small
rest of: a loss that does not depend on the length of a row has a gradient across that row, left over from one of any
direction, and in one dimension nothing is left. ``own`` is the size of the terms of which the definition makes a small
result, with fp64's rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from checking import DEVICE, TOLERANCES, backends_under_test, by_definition, rounding
from cuda_on_cpu import library as cuda_on_cpu
from hypothesis import settings
from torch import Tensor

import kdkernels
from kdkernels.ops import backend as backends
from kdkernels.ops.checks import compute_dtype

ULPS = 16  # of the inputs: each of a formula's steps may round once
DIRECTIONS = 6  # of perturbation, each a random sign per number
FLOOR = 1e-28  # absolute: products of numbers below it are not in fp32, and squares of fp64's rounding errors
UPSTREAM = 3.7  # no gradient is multiplied by 1, nor all of them by one number

MORE = settings(max_examples=4 * settings().max_examples)  # than an invariant, which asks of fewer inputs
Loss = Callable[..., Tensor]
Draw = Callable[..., Any]


class Case(NamedTuple):
    """One call, and what it is held against: see ``judge``."""

    function: Loss
    inputs: Sequence[Tensor]
    constants: Sequence[Tensor] = ()
    oracle: Loss | None = None
    by_row: bool = False
    overflow: bool = False
    natural: Tensor | float = 0.0
    rest_of: float = 0.0
    own: float = 0.0


class Family(NamedTuple):
    """A loss: the ops that it runs on and how to draw a call of it. Without an op it is the same on every backend."""

    ops: Sequence[str]
    draw: Callable[[Draw], Case]


def on_backends(families: Mapping[str, Family]) -> pytest.MarkDecorator:
    """Each loss on each backend of this process that has its ops."""
    probe, found = torch.ones(2, 2, 2, 2, device=DEVICE), []
    for name, family in families.items():
        for backend in backends_under_test() if family.ops else backends_under_test()[:1]:
            if cuda_on_cpu.requested() and not set(family.ops) <= set(backends.OPS):
                continue  # the executor's library has no kernels of a CPU
            if all(backends.why_not(op, backend, probe) is None for op in family.ops):
                found.append(pytest.param(family, backend, id=f"{name}-{backend}"))
    return pytest.mark.parametrize(("family", "backend"), found)


def check(draw: Draw, family: Family, backend: str) -> None:
    with kdkernels.use_backend(backend if family.ops else "auto"):
        function, inputs, constants, *options = family.draw(draw)
        judge(function, inputs, constants, **dict(zip(Case._fields[3:], options, strict=True)))


def leaves_float32(power: float, *tensors: Tensor) -> bool:
    """Whether sums of such powers of the numbers do, or may."""
    if compute_dtype(*tensors) == torch.float64:
        return False
    largest = max((x.double().nan_to_num(0, 0, 0).abs().max().item() for x in tensors if x.numel()), default=0.0)
    return largest > (torch.finfo(torch.float32).max / 1e5) ** (1 / power)


def _gradients(function: Loss, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Tensor]:
    """The loss and the inputs' gradients, for an upstream gradient that differs from value to value."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = function(*leaves, *constants)
    if not loss.requires_grad:  # of a batch without anything to compare
        return [loss.detach(), *(torch.zeros_like(x) for x in leaves)]
    weights = UPSTREAM * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, weights)]


def _exact(function: Loss, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Tensor]:
    return _gradients(function, [x.double() for x in inputs], [_wide(x) for x in constants])


def _in_float32(function: Loss, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> list[Tensor]:
    if compute_dtype(*inputs, *constants) == torch.float64:
        return _exact(function, inputs, constants)
    return _gradients(function, [x.float() for x in inputs], [_narrow(x) for x in constants])


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _moved(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Every number by one ulp, up or down."""
    if not x.is_floating_point():
        return x
    signs = torch.randint(2, x.shape, generator=generator, dtype=torch.float64).to(x.device) * 2 - 1
    return x.double() * (1 + eps * signs)


def sensitivities(
    function: Loss, inputs: Sequence[Tensor], constants: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Of loss and gradients: the largest change, number by number, over a few perturbations.

    And the rounding errors of the definition, which is not written to keep digits: what its fp32 is off by, times the
    ratio of the ulps.
    """
    generator = torch.Generator().manual_seed(0)
    own, ratio = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    exact = _exact(function, inputs, constants)
    largest = [torch.zeros_like(x) for x in exact]
    for _ in range(DIRECTIONS):
        moved = [[_moved(x, torch.finfo(dtype).eps, generator) for x in group] for group in (inputs, constants)]
        narrow = [[_narrow(_moved(x, own, generator)) for x in group] for group in (inputs, constants)]
        both = _gradients(function, *narrow), _exact(function, *narrow)
        for i, x in enumerate(_exact(function, *moved)):
            own_errors = ((both[0][i] - both[1][i]).abs() * ratio).nan_to_num(0, 0, 0)
            change = (x - exact[i]).abs().nan_to_num(0, 0, 0) + own_errors
            largest[i] = torch.maximum(largest[i], change)
    return largest


def _narrow(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _rows(x: Tensor, by_row: bool) -> Tensor:
    """(rows, numbers): those of a batch whose rows have nothing to do with each other, or one."""
    return x.reshape(len(x), -1) if by_row and x.dim() and len(x) else x.reshape(1, -1)


def _check_kinds(
    what: str, actual: Tensor, expected: Tensor, excused: Tensor | bool, narrow: Callable[[], Tensor]
) -> None:
    """Rows without a number are those of the definition; it may have numbers where a row is excused.

    ``narrow`` is the definition in float32, which has a number where only a probability that is none there, times inf,
    is not finite.
    """
    bad, expected_bad = (~_rows(x, True).isfinite().all(1) for x in (actual, expected))
    missed, extra = expected_bad & ~bad, bad & ~expected_bad & ~torch.as_tensor(excused, device=bad.device)
    if missed.any():
        missed &= ~_rows(narrow(), True).isfinite().all(1)
    assert not missed.any(), (
        f"{what}: finite in rows {missed.nonzero().flatten().tolist()}, where the definition is not"
    )
    assert not extra.any(), f"{what}: not finite in rows {extra.nonzero().flatten().tolist()}, the definition is"


def _of(natural: Tensor | float, rows: int) -> Tensor:
    found = torch.as_tensor(natural, dtype=torch.float64, device=DEVICE).nan_to_num(0, 0)
    return found if found.dim() == 0 or len(found) == rows else found.norm()


def judge(
    function: Loss,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
    *,
    oracle: Loss | None = None,
    by_row: bool = False,
    overflow: bool = False,
    natural: Tensor | float = 0.0,
    rest_of: float = 0.0,
    own: float = 0.0,
) -> list[Tensor]:
    """The loss and the gradients of ``inputs``, in the backend in force, against ``oracle`` in fp64, or the same
    function with every op by its definition.

    oracle: a formula written here, where a loss has parts that are not ops
    by_row: a row of the gradient, and a value of a loss without reduction, depends on that row of the inputs alone
    overflow: sums of this size leave float32; where they do, inf or NaN is right and another number is not
    natural: the norm of what the gradient is a difference of: of each row (N,), or of all
    rest_of: the same for the loss
    own: the size of the definition's terms
    """
    tensors = [x for x in (*inputs, *constants) if x.is_floating_point()]
    dtype = compute_dtype(*tensors)
    actual = _gradients(function, inputs, constants)
    assert actual[0].dtype == dtype, f"the loss is {actual[0].dtype}"
    for x, gradient in zip(inputs, actual[1:], strict=True):
        assert (gradient.dtype, gradient.shape) == (x.dtype, x.shape)
    oracle = oracle or function
    with by_definition():
        expected, moved = _exact(oracle, inputs, constants), None
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            what = "loss" if i == 0 else f"gradient {i - 1}"
            largest = torch.finfo(a.dtype).max
            e = torch.where(e.abs() > largest, torch.inf * e.sign(), e)  # inf is what a smaller dtype has for it
            # no number is better than a wrong one where sums overflow, and right for a row that is none
            if i and not by_row and not expected[0].isfinite().all():
                continue  # its gradient is that of nothing
            own_rows = [x for x in tensors if i and x.dim() and len(x) == len(a)] if a.dim() else []
            excused = overflow or sum(~_rows(x, True).isfinite().all(1) for x in own_rows) > 0
            _check_kinds(what, a, e, excused, lambda i=i: _in_float32(oracle, inputs, constants)[i])  # type: ignore[misc]
            both = a.isfinite() & e.isfinite()
            a, e = a.where(both, 0), e.where(both, 0)
            error, size = (_rows(x, by_row).norm(dim=1) for x in (a.double() - e, e))
            base = TOLERANCES[dtype].loss if i == 0 else TOLERANCES[dtype].gradient
            allowed = base * size + ULPS * torch.finfo(torch.float64).eps * own + FLOOR
            rounded = UPSTREAM * _of(natural, len(error)) if i else rest_of
            allowed = allowed + ULPS * torch.finfo(dtype).eps * rounded
            if a.dtype != dtype:
                allowed = allowed + _rows(rounding(e, a.dtype), by_row).norm(dim=1)
            if (error <= allowed).all():
                continue
            moved = moved or sensitivities(oracle, inputs, constants, dtype)
            allowed = allowed + ULPS * _rows(moved[i].where(both, 0), by_row).norm(dim=1)
            worst = int((error / allowed).argmax())
            assert (error <= allowed).all(), (
                f"{what}, row {worst}: error {error[worst]:.3e} is over {allowed[worst]:.3e} (norm {size[worst]:.3e})"
            )
    return actual


def close(what: str, actual: Tensor, expected: Tensor, allowed: Tensor | float) -> None:
    """Of an invariant: the largest difference of two results."""
    difference = (actual.double() - expected.double()).abs()
    largest = difference.max().item() if difference.numel() else 0.0
    bound = allowed.max().item() if isinstance(allowed, Tensor) else allowed
    assert largest <= bound, f"{what}: {largest:.3e} is over {bound:.3e}"


def fp64(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)
