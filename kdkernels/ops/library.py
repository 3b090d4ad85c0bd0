"""The torch.library namespace "kdkernels" and how an op enters it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("kdkernels", "DEF")


def define(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``kdkernels::name`` and return its callable.

    The op is opaque to torch.compile: its body chooses the backend each time it runs, so a compiled graph follows a
    change of backend. Autocast is switched off inside: the body's own arithmetic decides the precision, and an eager
    and a compiled call would differ otherwise.
    """
    # pt2_compliant_tag: the op has a fake kernel and passes opcheck, so Inductor keeps the strides that it sees
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

    def implementation(*args: Any) -> Any:
        device = _device_type(args)
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return body(*args)
        return body(*args)

    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kdkernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.kdkernels, name).default


def _device_type(args: tuple[Any, ...]) -> str:
    for arg in args:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if isinstance(first, torch.Tensor):
            return first.device.type
    return "cpu"


def set_autograd(
    op: Any,
    inputs: Callable[..., Sequence[Tensor]],
    saved: Callable[..., tuple[Sequence[Tensor | None], Any]],
    backward: Callable[..., Sequence[Tensor | None]],
    what: str,
) -> None:
    """Give ``op`` a gradient for its first output.

    inputs(*args)                       the tensors among the op's arguments that gradients may flow to
    saved(args, outputs)                the tensors to save, and anything else that backward needs
    backward(grad, tensors, others)     one gradient per input

    The same registration as torch.library.register_autograd makes, which flattens its arguments as a tree: with lists
    of tensors that alone costs 0.2 ms per call, more than the kernels behind it.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], *_: Tensor) -> Any:
            outputs = below_autograd(keyset, args)
            tensors, ctx.others = saved(args, outputs)
            # a teacher's outputs may come from torch.inference_mode(), and autograd refuses to save those as they are
            ctx.save_for_backward(*(t.clone() if t is not None and t.is_inference() else t for t in tensors))
            ctx.mark_non_differentiable(*outputs[1:])
            ctx.set_materialize_grads(False)
            return outputs

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():  # autograd enables gradients here only under create_graph=True
                raise RuntimeError(f"{what} has no second derivative: take gradients without create_graph=True")
            if grad is None:
                return (None,) * len(ctx.needs_input_grad)
            gradients = backward(grad, ctx.saved_tensors, ctx.others)
            return None, None, *(g if n else None for g, n in zip(gradients, ctx.needs_input_grad[2:], strict=True))

    def below_autograd(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def autograd(keyset: Any, *args: Any) -> Any:
        tensors = inputs(*args)
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(f"{what} has no forward-mode derivative (jvp, jacfwd): it would be a silent zero")
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return Function.apply(keyset, args, *tensors)
        return below_autograd(keyset, args)

    LIBRARY.impl(op.name().split("::")[1], autograd, "Autograd", with_keyset=True)
