"""The torch.library namespace "kdkernels" and how an op enters it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("kdkernels", "DEF")
_PLAIN = frozenset((Tensor, torch.nn.Parameter, float, int, bool, str, type(None)))


class Op:
    """``kdkernels::name``. Called, it gives all its outputs; ``loss(...)`` gives the first, which has the gradient.

    The op is opaque to torch.compile: its body chooses the backend each time it runs, so a compiled graph follows a
    change of backend. Autocast is switched off inside: the body's own arithmetic decides the precision, and an eager
    and a compiled call would differ otherwise.

    A plain eager call runs the body and the same autograd node without the dispatcher, whose way through Python costs
    more than the kernels of a small loss. Whoever traces, transforms or profiles meets the op.
    """

    def __init__(self, name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
        # pt2_compliant_tag: the op has a fake kernel and passes opcheck, so Inductor keeps the strides that it sees
        LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kdkernels::{name}", fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.kdkernels, name).default
        self._body = body
        self._plain_loss: Callable[..., Tensor]

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _somebody_listens(args):
            return self.overload(*args)
        return self._run(*args)

    def loss(self, *args: Any) -> Tensor:
        if torch.compiler.is_compiling() or _somebody_listens(args):
            return self.overload(*args)[0]
        return self._plain_loss(*args)

    def _run(self, *args: Any) -> Any:
        device = _first(args).device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._body(*args)
        return self._body(*args)

    def _below_autograd(self, keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def set_autograd(
        self,
        inputs: Callable[..., Sequence[Tensor]],
        saved: Callable[..., tuple[Sequence[Tensor | None], Any]],
        backward: Callable[..., Sequence[Tensor | None]],
        what: str,
    ) -> None:
        """Give the op a gradient for its first output.

        inputs(*args)                       the tensors among the op's arguments that gradients may flow to
        saved(args, outputs)                the tensors to save, and anything else that backward needs
        backward(grad, tensors, others)     one gradient per input

        The same registration as torch.library.register_autograd makes, which flattens its arguments as a tree: with
        lists of tensors that alone costs 0.2 ms per call, more than the kernels behind it.
        """
        op = self

        class Plain(torch.autograd.Function):
            """The node of a call that did not pass the dispatcher: one output."""

            @staticmethod
            def forward(ctx: Any, args: tuple[Any, ...], *_: Tensor) -> Any:
                outputs = op._run(*args)
                save(ctx, args, outputs)
                return outputs[0]

            @staticmethod
            def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
                return None, *gradients(ctx, grad, ctx.needs_input_grad[1:])

        class Dispatched(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], *_: Tensor) -> Any:
                outputs = op._below_autograd(keyset, args)
                save(ctx, args, outputs)
                ctx.mark_non_differentiable(*outputs[1:])
                return outputs

            @staticmethod
            def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
                return None, None, *gradients(ctx, grad, ctx.needs_input_grad[2:])

        def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
            tensors, ctx.others = saved(args, outputs)
            # a teacher's outputs may come from torch.inference_mode(), and autograd refuses to save those as they are
            ctx.save_for_backward(*[t.clone() if t is not None and t.is_inference() else t for t in tensors])
            ctx.set_materialize_grads(False)

        def gradients(ctx: Any, grad: Tensor | None, needed: tuple[bool, ...]) -> Sequence[Tensor | None]:
            if torch.is_grad_enabled():  # autograd enables gradients here only under create_graph=True
                raise RuntimeError(f"{what} has no second derivative: take gradients without create_graph=True")
            if grad is None:
                return (None,) * len(needed)
            found = backward(grad, ctx.saved_tensors, ctx.others)
            return found if all(needed) else [g if n else None for g, n in zip(found, needed, strict=True)]

        def plain_loss(*args: Any) -> Tensor:
            tensors = inputs(*args)
            if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
                return Plain.apply(args, *tensors)
            return op._run(*args)[0]

        def autograd(keyset: Any, *args: Any) -> Any:
            tensors = inputs(*args)
            if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
                raise NotImplementedError(
                    f"{what} has no forward-mode derivative (jvp, jacfwd): it would be a silent zero"
                )
            if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
                return Dispatched.apply(keyset, args, *tensors)
            return op._below_autograd(keyset, args)

        self._plain_loss = plain_loss
        LIBRARY.impl(self.overload.name().split("::")[1], autograd, "Autograd", with_keyset=True)


def _first(args: tuple[Any, ...]) -> Tensor:
    return args[0][0] if isinstance(args[0], list) else args[0]


def _somebody_listens(args: tuple[Any, ...]) -> bool:
    """Whether a mode, a transform, a profiler, a tracer or a tensor of another class has to see the call."""
    first = _first(args)
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or first.is_meta
        or torch._C._functorch.is_legacy_batchedtensor(first)  # autograd's own batched gradients
    ):
        return True
    for arg in args:
        if type(arg) is list:
            for x in arg:
                if type(x) not in _PLAIN:
                    return True
        elif type(arg) not in _PLAIN:
            return True
    return False
