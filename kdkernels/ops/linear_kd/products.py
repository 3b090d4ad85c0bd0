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

SLICE = 1 << 20  # elements of the weights that a CPU takes at a time: 4 MB of fp32
WIDE_SLICE = 1 << 23  # in the gradients' products, where a slice costs more
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


def _slices(weight: Tensor, dtype: torch.dtype, size: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """The weights' rows in ``dtype``: in slices of ``size`` elements, and if they are widened; else all at once."""
    rows, width = weight.shape
    size = size or (0 if weight.dtype == dtype else SLICE)
    # a third: with all tokens, a slice's logits are less than half of all
    step = max(1, min(size // max(width, 1), -(-rows // 3))) if size else max(rows, 1)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        yield part, weight[part].to(dtype)


def logits(head: Linear, h: Tensor, pieces: list[Tensor]) -> None:
    """The logits (n, V) of hidden states (n, D), written into ``pieces``, some rows each; one piece but on CPUs."""
    first = pieces[0]
    if has_half_products(h, head.weight, first):
        torch.mm(h, head.weight.t(), out_dtype=first.dtype, out=first)
    else:
        h = h.to(first.dtype)
        # few tokens' products are up to a seventh faster from slices of the weights; the gradients' are not
        for columns, weight in _slices(head.weight, first.dtype, SLICE if h.is_cpu else 0):
            if len(pieces) == 1:
                torch.mm(h, weight.t(), out=first[:, columns])
                continue
            for rows, out in _rows(torch.mm(h, weight.t()), pieces):
                out[:, columns] = rows
    for out in pieces:
        if head.bias is not None:
            out.add_(head.bias)
        if head.scale != 1:
            out.mul_(head.scale)
        if head.softcap:
            out.div_(head.softcap).tanh_().mul_(head.softcap)


def _rows(x: Tensor, pieces: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of x (n, ...) that belong to each of the pieces."""
    return zip(x.split([len(piece) for piece in pieces]), pieces, strict=True)


def slope(head: Linear, z: Tensor) -> Tensor | None:
    """The cap's derivative at the logits z that it gave: 1 - (z / softcap)^2. None without a cap."""
    return (z / head.softcap).square_().neg_().add_(1) if head.softcap else None


class Gradients(NamedTuple):
    """Sums over the chunks; None where no gradient is wanted."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)

    def add(self, head: Linear, h: Tensor, pieces: list[Tensor], begin: int) -> None:
        """A chunk's share: its hidden states h, rows ``begin`` and on, and the gradient of h W^T + b in pieces."""
        columns = pieces[0].shape[1]
        d_hidden = None if self.hidden is None else self.hidden[begin : begin + len(h)]
        d_weight = None if self.weight is None else self.weight[:columns]
        for g in pieces:
            if head.scale != 1:
                g.mul_(head.scale)
            if self.bias is not None:
                self.bias[:columns] += g.sum(0)
        if has_half_products(h, head.weight, pieces[0]):
            g = pieces[0].to(h.dtype)
            if d_hidden is not None:
                torch.mm(g, head.weight, out_dtype=d_hidden.dtype, out=d_hidden)
            if d_weight is not None:
                torch.addmm(d_weight, g.t(), h, out_dtype=d_weight.dtype, beta=float(begin > 0), out=d_weight)
            return
        if d_hidden is not None:
            _add_d_hidden(d_hidden, head.weight, pieces)
        if d_weight is not None:
            _add_d_weight(d_weight, h.to(d_weight.dtype), pieces, begin > 0)


def _add_d_hidden(d_hidden: Tensor, weight: Tensor, pieces: list[Tensor]) -> None:
    """G W, of all rows by a slice of the weights: many rows read them once."""
    size = WIDE_SLICE if len(pieces) > 1 else 0
    for part, w in _slices(weight, d_hidden.dtype, size):
        g = pieces[0][:, part] if len(pieces) == 1 else torch.cat([piece[:, part] for piece in pieces])
        d_hidden.addmm_(g, w, beta=float(part.start > 0))


def _add_d_weight(d_weight: Tensor, h: Tensor, pieces: list[Tensor], keep: bool) -> None:
    """G^T h, of all pieces by a slice, before it leaves the cache; the first chunk overwrites what was in memory."""
    for part, d in _slices(d_weight, d_weight.dtype, WIDE_SLICE if len(pieces) > 1 else 0):
        for i, (rows, g) in enumerate(_rows(h, pieces)):
            d.addmm_(g[:, part].t(), rows, beta=float(keep or i > 0))
