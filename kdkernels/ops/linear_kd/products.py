"""The matrix products of an output head, for a chunk of tokens. Logits and sums are fp32 (fp64) whatever the inputs.

Half-precision operands go to a GPU's tensor cores with an fp32 result. Elsewhere they are widened, a slice of the
weights at a time. In the gradients' products the tensor cores take the logits' gradient rounded to half precision: each
of its elements is off by 2^-9 of itself at most (bf16), while rounding the logits would put an error of 2^-9 of a logit
into differences that may be smaller than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SLICE = 1 << 21  # elements of the weights that a CPU takes at a time: 8 MB of fp32
HALF = (torch.float16, torch.bfloat16)


class Linear(NamedTuple):
    """An output head: z = cap(scale (h W^T + b)) of a hidden state h."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float

    def narrow(self, columns: int) -> Linear:
        """The head without the columns that do not exist."""
        return self._replace(weight=self.weight[:columns], bias=None if self.bias is None else self.bias[:columns])


def has_half_products(h: Tensor, weight: Tensor, out: Tensor) -> bool:
    return h.is_cuda and h.dtype == weight.dtype and h.dtype in HALF and out.dtype == torch.float32


def _slices(weight: Tensor, dtype: torch.dtype, always: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the weights in ``dtype``: all at once, or in slices if they are widened, or ``always``."""
    rows, width = weight.shape
    step = max(1, SLICE // max(width, 1) if always or weight.dtype != dtype else rows)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        yield part, weight[part].to(dtype)


def logits(head: Linear, h: Tensor, out: Tensor) -> Tensor:
    """The logits (n, V) of hidden states (n, D), written into ``out``."""
    if has_half_products(h, head.weight, out):
        torch.mm(h, head.weight.t(), out_dtype=out.dtype, out=out)
    else:
        h = h.to(out.dtype)
        # few tokens' products are up to a seventh faster from slices of the weights; the gradients' are not
        for columns, weight in _slices(head.weight, out.dtype, always=out.is_cpu):
            torch.mm(h, weight.t(), out=out[:, columns])
    if head.bias is not None:
        out.add_(head.bias)
    if head.scale != 1:
        out.mul_(head.scale)
    if head.softcap:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def slope(head: Linear, z: Tensor) -> Tensor | None:
    """The cap's derivative at the logits z that it gave: 1 - (z / softcap)^2. None without a cap."""
    return (z / head.softcap).square_().neg_().add_(1) if head.softcap else None


class Gradients(NamedTuple):
    """Sums over the chunks; None where no gradient is wanted."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)

    def add(self, head: Linear, h: Tensor, g: Tensor, begin: int) -> None:
        """A chunk's share: its hidden states h, those from row ``begin`` on, and the gradient g of h W^T + b."""
        end, columns = begin + h.shape[0], g.shape[1]
        d_hidden = None if self.hidden is None else self.hidden[begin:end]
        d_weight = None if self.weight is None else self.weight[:columns]
        if head.scale != 1:
            g.mul_(head.scale)
        if self.bias is not None:
            self.bias[:columns] += g.sum(0)
        keep = float(begin > 0)  # the first chunk overwrites what was in memory
        if has_half_products(h, head.weight, g):
            g = g.to(h.dtype)
            if d_hidden is not None:
                torch.mm(g, head.weight, out_dtype=d_hidden.dtype, out=d_hidden)
            if d_weight is not None:
                torch.addmm(d_weight, g.t(), h, out_dtype=d_weight.dtype, beta=keep, out=d_weight)
            return
        if d_hidden is not None:
            for part, weight in _slices(head.weight, g.dtype):
                d_hidden.addmm_(g[:, part], weight, beta=float(part.start > 0))
        if d_weight is not None:
            d_weight.addmm_(g.t(), h.to(g.dtype), beta=keep)
