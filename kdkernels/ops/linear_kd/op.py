"""linear_kd: from hidden states and output weights to a distillation loss and its gradients, without the logits.

chunks.py makes the logits of some tokens, a row pass turns them into losses and, in place, into their gradient, and
products.py multiplies that into gradients of hidden states and weights. For "mean" and "sum" all of it happens in the
forward pass, as the logits would have to be made again; for "none", where every row's upstream gradient has to be known
first, in the backward pass. The row pass is softmax_kl's, or top_k.py and ranks.py in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..library import Differentiable, build, may_hand_on, refuse_second_derivative, register, schema
from . import chunks
from .columns import Columns
from .record import LinearKD


def _empty(x: LinearKD, now: bool) -> tuple[Tensor, ...]:
    """Outputs for the gradients; those that are not wanted have no elements."""
    return tuple(x.hidden.new_empty((0,) if i is None or not now else i.shape, dtype=x.dtype) for i in x.inputs)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    x, need_grad = build(LinearKD, args), args[-1]
    rows = x.options.reduction == "none"
    loss = x.hidden.new_empty(x.hidden.shape[:1] if rows else (), dtype=x.dtype)
    return loss, *_empty(x, need_grad and not rows), x.hidden.new_empty((), dtype=x.dtype)


row_backward_op = register(
    "linear_kd_row_backward",
    f"(Tensor grad, {schema(LinearKD)}) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    lambda grad, *args: chunks.backward(grad, build(LinearKD, args)),
    lambda grad, *args: _empty(build(LinearKD, args), True),
)


def _makes_logits_again(args: Sequence[Any]) -> bool:
    return build(LinearKD, args).options.reduction == "none"


def _keep(args: Sequence[Any]) -> Sequence[Any]:
    """All arguments for "none"; else the dtypes of the gradients."""
    return args[:-1] if _makes_logits_again(args) else _dtypes(build(LinearKD, args))


def _dtypes(x: LinearKD) -> list[torch.dtype | None]:
    return [None if i is None else i.dtype for i in x.inputs]


def _scaled(
    gradients: Sequence[Tensor], factor: Tensor, dtypes: Sequence[torch.dtype | None]
) -> tuple[Tensor | None, ...]:
    """The gradients times the upstream gradient, rounded to their inputs' dtypes; not in place, for backward twice.

    A loss is mostly the last thing before ``backward()``; then a CPU is spared a pass over as much as the weights.
    """
    if not may_hand_on(factor):
        gradients = [g if d is None else g * factor for g, d in zip(gradients, dtypes, strict=True)]
    return tuple(None if d is None else g.to(d) for g, d in zip(gradients, dtypes, strict=True))


def _backward(
    grad: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor, scale: Tensor, *kept: Any, **values: Tensor
) -> tuple[Tensor | None, ...]:
    if len(kept) == 3:
        return _scaled((d_hidden, d_weight, d_bias), grad * scale, kept)
    return _scaled(row_backward_op(grad, *kept, **values), scale, _dtypes(build(LinearKD, kept)))


_op = Differentiable(
    "linear_kd",
    LinearKD,
    "Tensor loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor scale",
    lambda *args: chunks.forward(build(LinearKD, args), args[-1]),
    _fake,
    keep=_keep,
    backward=_backward,
    inputs=3,
    keeps_constants=_makes_logits_again,
)


def linear_kd(x: LinearKD) -> Tensor:
    """The tokens' terms, reduced: float32 (float64 if an input is). Gradients flow to the student's three tensors.

    Arguments are the caller's to check: linear_kd_loss.py does.
    """
    return _op(x)


class _OverRanks(torch.autograd.Function):
    """The same where each rank has some columns. A process group is no argument of an op."""

    @staticmethod
    def forward(ctx: Any, x: LinearKD, columns: Columns, need_grad: bool, *inputs: Tensor) -> Tensor:
        with torch.autocast(x.hidden.device.type, enabled=False):
            loss, *rest = chunks.forward(x, need_grad, columns)
        ctx.x, ctx.columns = x, columns
        # "none" needs the inputs again, and autograd watches that nobody changes them
        ctx.save_for_backward(*rest, *(inputs if x.options.reduction == "none" else ()))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_kd_loss with group=")
        *gradients, scale = ctx.saved_tensors[:4]
        if ctx.x.options.reduction == "none":
            with torch.autocast(grad.device.type, enabled=False):
                gradients, grad = list(chunks.backward(grad, ctx.x, ctx.columns)), scale
        else:
            grad = grad * scale
        return None, None, None, *_scaled(gradients, grad, _dtypes(ctx.x))


def linear_kd_over_ranks(x: LinearKD, columns: Columns) -> Tensor:
    """``linear_kd`` where every rank of ``columns.group`` calls with its columns of both networks' weights."""
    return _OverRanks.apply(x, columns, any(x.options[-3:]), *x[:3])
