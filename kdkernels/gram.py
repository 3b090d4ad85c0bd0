"""Products and cosines of rows: what relational losses are made of, with sums in fp32 and gradients.

gram(x)       K[i, j] = <x_i, x_j>         dL/dx = (dK + dK^T) x
gram(x, y)    K[i, j] = <x_i, y_j>         dL/dx = dK y,  dL/dy = dK^T x
cosine_similarity(x, y)    <x_i, y_j> / (|x_i| |y_j|)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.checks import FLOATING, check_flag, compute_dtype
from .ops.gram import cosine_similarity as cosines
from .ops.gram import gram_of, own_gram


def gram(x: Tensor, y: Tensor | None = None, *, centered: bool = False) -> Tensor:
    """All inner products of the rows of x, or of the rows of x with those of y.

    Args:
        x: (N, ...), a row being all of ``x[i]``. float16, bfloat16, float32 or float64, any strides: channels_last is
            read without a copy.
        y: (M, ...) with as many numbers in a row, in the same order; None: x itself, for half the work.
        centered: subtract its mean row from each of the two first. In float32 this is more than a choice of formula:
            features with a large mean lose what their products differ by.

    Returns:
        (N, N) or (N, M), float32 (float64 if an input is), summed in at least that. Gradients flow to x and y.

    Raises:
        TypeError, ValueError: something other than floating-point tensors of rows, on one device.
    """
    _check("gram", x, y)
    check_flag("gram: centered", centered)
    if centered:
        dtype = compute_dtype(*(x,) if y is None else (x, y))
        x, y = _centered(x, dtype), None if y is None else _centered(y, dtype)
    if y is None:
        return own_gram(x)
    return gram_of(*_as_rows("gram", x, y))


def cosine_similarity(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The cosines of the rows of x, or of the rows of x with those of y.

    Args:
        x: (N, ...), a row being all of ``x[i]``. float16, bfloat16, float32 or float64, any strides.
        y: (M, ...) with as many numbers in a row; None: x itself.

    Returns:
        (N, N) or (N, M), float32 (float64 if an input is). Gradients flow to x and y. A row shorter than 1e-8 counts as
        1e-8 long, so a zero row has cosine 0 with every row.

    Raises:
        TypeError, ValueError: something other than floating-point tensors of rows, on one device.
    """
    _check("cosine_similarity", x, y)
    if y is None:
        dtype = compute_dtype(x)  # both sides are the same rows, whose gradients are rounded once, as a sum
        x = y = x.to(dtype)
    return cosines(*_as_rows("cosine_similarity", x, y))


def _check(caller: str, x: Tensor, y: Tensor | None) -> None:
    for name, value in (("x", x),) if y is None else (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{caller}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dtype not in FLOATING:
            raise TypeError(f"{caller}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
        if value.dim() < 2:
            raise ValueError(f"{caller}: {name} must be (N, ...), got {tuple(value.shape)}")
    if y is not None and x.device != y.device:
        raise ValueError(f"{caller}: x is on {x.device} and y on {y.device}; move one of them")


def _as_rows(caller: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.flatten(1), y.flatten(1)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{caller}: rows of x and y must have the same width, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return a, b


def _centered(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x - x.mean(0, keepdim=True) if x.shape[0] else x
