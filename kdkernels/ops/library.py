"""The torch.library namespace "kdkernels": how an op enters it and gets its gradient, by public PyTorch alone.

An op's arguments are a record, a NamedTuple of tensors, numbers and smaller records: ``schema`` writes it as
torch.library wants it, ``flatten`` and ``build`` take it there and back.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from .changing import changing, kept_values, with_values
from .saved import is_layers, save, saved

LIBRARY = torch.library.Library("kdkernels", "DEF")
# the op has a fake kernel and passes opcheck, so that Inductor keeps the strides that it sees
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[float]: "float[]",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
}
Record = TypeVar("Record", bound=tuple[Any, ...])


@cache
def _fields(record: type) -> list[tuple[str, Any]]:
    return list(typing.get_type_hints(record).items())


@cache
def _parts(record: type) -> list[tuple[type | None, int]]:
    """Of each field the smaller record that it is, if it is one, and how many arguments it takes."""
    return [(None, 1) if kind in TYPES else (kind, len(_fields(kind))) for _, kind in _fields(record)]


def _kinds(record: type) -> list[Any]:
    """The types of ``flatten``'s arguments."""
    kinds: list[Any] = []
    for _, kind in _fields(record):
        kinds += [kind] if kind in TYPES else _kinds(kind)
    return kinds


def schema(record: type) -> str:
    """The record's fields as a schema's arguments: ``Tensor student, Tensor teacher, ...``."""
    return ", ".join(f"{TYPES[kind]} {name}" if kind in TYPES else schema(kind) for name, kind in _fields(record))


def flatten(record: tuple[Any, ...]) -> list[Any]:
    """The arguments of an op that takes this record."""
    flat: list[Any] = []
    for value in record:
        if isinstance(value, tuple):
            flat += value
        else:
            flat.append(value)
    return flat


def build(record: type[Record], flat: Sequence[Any]) -> Record:
    """The record from an op's arguments; arguments after the record's are left out."""
    fields, at = [], 0
    for part, count in _parts(record):
        fields.append(flat[at] if part is None else part(*flat[at : at + count]))
        at += count
    return record(*fields)


def register(name: str, signature: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The op ``kdkernels::name``, for every device; ``fake`` makes its outputs without their values.

    It is opaque to torch.compile: its body chooses the backend each time it runs, so that a compiled graph follows a
    change of backend. Autocast is off inside: the body's own arithmetic decides the precision, and an eager and a
    compiled call would differ otherwise. ``values``, if given, are those of all its floats: see changing.py.
    """

    def run(*args: Any, values: Tensor | None = None) -> Any:
        if values is not None:
            args = tuple(with_values(args, values))
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if torch.is_autocast_enabled(first.device.type):
            with torch.autocast(first.device.type, enabled=False):
                return body(*args)
        if torch.is_grad_enabled():  # as make_fx, which traces below autograd, has it: no ``out=`` could follow
            with torch.no_grad():
                return body(*args)
        return body(*args)

    def run_fake(*args: Any, values: Tensor | None = None) -> Any:
        return fake(*args)

    if "float" in signature and "values" not in signature:
        signature = signature.replace(") ->", ", *, Tensor? values=None) ->")
    LIBRARY.define(name + signature, tags=TAGS)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kdkernels::{name}", run_fake, lib=LIBRARY)
    return typing.cast("Callable[..., Any]", getattr(torch.ops.kdkernels, name).default)


class Differentiable:
    """The op ``kdkernels::name`` of a record, called for its first output, which has gradients for the record's first
    field(s). Its arguments are the record's and ``bool need_grad``.

    In eager mode a torch.autograd.Function calls the op, forward and backward, so that modes, profilers and tracers see
    it. Where torch.compile traces, a second op with the same body has its gradient by register_autograd, which
    AOTAutograd wants and whose bookkeeping would cost a small loss more than its kernels.

        keep(args)          the arguments that the backward pass needs
        backward            an op of (grad, *outputs, *kept) for the gradients of the first ``inputs`` arguments
        inputs              how many arguments, tensors or lists of them, get gradients
        keeps_loss          whether the first output is among the outputs that the backward pass gets
        keeps_constants     whether ``keep`` takes tensors that get no gradients, always or of a call with these args
    """

    def __init__(
        self,
        name: str,
        record: type,
        outputs: str,
        body: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        keep: Callable[[Sequence[Any]], Sequence[Any]],
        backward: Callable[..., Any],
        inputs: int = 1,
        keeps_loss: bool = False,
        keeps_constants: bool | Callable[[Sequence[Any]], bool] = False,
    ) -> None:
        first = 0 if keeps_loss else 1  # of the outputs that are kept
        signature = f"({schema(record)}, bool need_grad) -> ({outputs}"
        self._inputs = inputs
        self._floats = [i for i, kind in enumerate(_kinds(record)) if kind in (float, list[float])]
        self._node = _node(name, register(name, f"{signature})", body, fake), keep, backward, first)
        if keeps_constants:
            needed = keeps_constants if callable(keeps_constants) else lambda args: True
            body, fake = _with_copies(body, inputs, needed), _with_copies(fake, inputs, needed)
            signature = f"{signature}, Tensor[] copies"
        signature = signature.replace(", bool need_grad)", ", bool need_grad, Tensor? values=None)")
        self._traced = register(
            f"{name}_traced", f"{signature})", _traced_body(body), lambda *args: fake(*_without_values(args)[0])
        )
        _register_traced_backward(name, keep, backward, first, inputs, bool(keeps_constants))

    def __call__(self, record: tuple[Any, ...]) -> Tensor:
        inputs = record[0] if isinstance(record[0], list) else record[: self._inputs]
        need_grad = False
        if torch.is_grad_enabled():
            for x in inputs:
                need_grad = need_grad or (x is not None and x.requires_grad)
        args: list[Any] = []
        for value in record:  # ``flatten``, without the price of a call
            if isinstance(value, tuple):
                args.extend(value)  # not +=: torch 2.11 traces no sum of a list and a NamedTuple
            else:
                args.append(value)
        args.append(need_grad)
        if torch.compiler.is_compiling():
            args, values = changing(args, self._floats)
            return _several(self._traced(*args) if values is None else self._traced(*args, values))[0]
        return typing.cast(Tensor, self._node.apply(args, *inputs))


def _without_values(args: Sequence[Any]) -> tuple[Sequence[Any], Tensor | None]:
    """A traced op's arguments up to need_grad, and the values that may follow. PyTorch leaves out what is None."""
    return (args, None) if isinstance(args[-1], bool) else (args[:-1], args[-1])


def _traced_body(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body of the traced op from that of the eager one."""

    def traced(*args: Any) -> Any:
        plain, values = _without_values(args)
        return body(*(plain if values is None else with_values(plain, values)))

    return traced


def _with_copies(body: Callable[..., Any], count: int, needed: Callable[[Sequence[Any]], bool]) -> Callable[..., Any]:
    """The body with copies of the constant tensors as one more output.

    A compiled graph saves its inputs as they are, which autograd refuses for tensors from torch.inference_mode(), and
    while it is traced nobody can see that a teacher's logits are such.
    """

    def with_copies(*args: Any) -> tuple[Any, ...]:
        constants = args[count:] if args[-1] and needed(args) else ()  # args[-1]: need_grad
        return *_several(body(*args)), [x.clone() for x in constants if isinstance(x, Tensor)]

    return with_copies


def _replaced(args: Sequence[Any], count: int, copies: Sequence[Tensor]) -> Sequence[Any]:
    """The arguments with the constant tensors replaced by their copies, if there are any."""
    left = iter(copies)
    return [*args[:count], *(next(left, x) if isinstance(x, Tensor) else x for x in args[count:])]


def _node(
    name: str, op: Callable[..., Any], keep: Callable[..., Sequence[Any]], backward: Callable[..., Any], first: int
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, args: Sequence[Any], *_: Tensor) -> Any:
        outputs = op(*args)
        if isinstance(outputs, Tensor):  # ``_several``, without the price of a call
            outputs = (outputs,)
        if args[-1]:  # need_grad
            save(ctx, (*outputs[first:], *keep(args)))
        return outputs[0]

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(name)
        found = backward(grad, *saved(ctx))
        return (None, found) if isinstance(found, Tensor) else (None, *found)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"{name} has no forward-mode derivative (jvp, jacfwd)")

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients), "jvp": staticmethod(jvp)}
    return type(f"kdkernels_{name}", (torch.autograd.Function,), methods)  # a loss's grad_fn is called so


def _register_traced_backward(
    name: str,
    keep: Callable[..., Sequence[Any]],
    backward: Callable[..., Any],
    first: int,
    count: int,
    keeps_constants: bool,
) -> None:
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:  # called by these names
        inputs, values = _without_values(inputs)
        # a list of tensors wants a list of gradients, a list of numbers one None
        ctx.constants = [[None] * len(x) if is_layers(x) else None for x in inputs[count:]]
        ctx.constants += [] if values is None else [None]
        if keeps_constants:
            *output, copies = output
            inputs = _replaced(inputs, count, copies)
        values = None if values is None else kept_values(keep, inputs, values)
        save(ctx, (*_several(output)[first:], *keep(inputs), values))

    def gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        refuse_second_derivative(name)
        *kept, values = saved(ctx)
        found = backward(grad, *kept) if values is None else backward(grad, *kept, values=values)
        own = found if isinstance(found, tuple) else (found,)
        return (*own, *ctx.constants)

    torch.library.register_autograd(f"kdkernels::{name}_traced", gradients, setup_context=setup_context, lib=LIBRARY)


def refuse_second_derivative(name: str) -> None:
    if torch.is_grad_enabled():  # autograd enables gradients in a backward pass only under create_graph=True
        raise RuntimeError(f"{name} has no second derivative: take gradients without create_graph=True")


def _keeps_graph() -> bool:
    """Whether the running backward pass keeps what is saved, for another pass. No public name of PyTorch tells."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def may_hand_on(factor: Tensor) -> bool:
    """Whether the upstream gradient is seen to be 1 (a GPU's host would wait for it) in the only backward pass."""
    if torch.compiler.is_compiling() or type(factor) is not Tensor or not factor.is_cpu or _keeps_graph():
        return False
    try:
        return factor.item() == 1
    except RuntimeError:  # a batch of upstream gradients, or a tracer's
        return False


def _several(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """An op's outputs, of which torch.library gives one as itself."""
    return (outputs,) if isinstance(outputs, Tensor) else outputs
