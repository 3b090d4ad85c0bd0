"""correlation: MLKD's correlation loss as one op and one node of autograd.

    S[a, j] = cos(view row a, base row j) of the student, T of the teacher
    row a   = KL(softmax(T / tau) || softmax(S / tau))

It has no kernels of its own: it runs those of gram and softmax_kl one after the other, without autograd between them,
whose bookkeeping would take longer than they do on batches of ordinary size. ``forward`` and ``backward`` are the one
way to compute it: where the batch is spread over ranks, distributed.py calls them with its own cosines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import choose
from ..checks import compute_dtype
from ..gram.op import COSINE_EPS, Gram
from ..library import Differentiable, build, register, schema
from ..softmax_kl.op import STATS, Rows, SoftmaxKL

Cosine = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
]  # Gram.cosine_forward, of one process or of all ranks


class CorrelationOptions(NamedTuple):
    """How rows become a loss."""

    views: int  # 1: every row against all others
    temperature: float
    reduction: str = "mean"  # over the view rows; "sum", "none"


class ViewRows(NamedTuple):
    """What correlation computes."""

    student: Tensor  # (V B, d), row V b + r being view r of image b
    teacher: Tensor  # (V B, d'); a constant
    options: CorrelationOptions


def view_rows(x: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """The view rows ((V - 1) B, d) and the base rows (B, d); of one view, all rows twice."""
    if views == 1:
        return x, x
    rows, width = x.shape
    images = x.view(rows // views, views, width)
    return images.narrow(1, 1, views - 1).reshape(-1, width), images.select(1, 0)


def comparable(rows: int, views: int) -> bool:
    """Whether there is anything to compare: an image, or two where each is compared with the others."""
    return rows >= (2 if views == 1 else 1)


def nothing(student: Tensor, teacher: Tensor, rows: int, options: CorrelationOptions) -> Tensor:
    """The loss where nothing is comparable: 0, in the graph."""
    zero = student.to(compute_dtype(student, teacher)).sum() * 0
    return zero.expand(rows) if options.reduction == "none" else zero


def _off_diagonal(square: Tensor) -> Tensor:
    """(B, B - 1). Read from its second element on in rows of B + 1, the matrix has its diagonal in the last column."""
    b = square.shape[0]
    return square.reshape(-1)[1:].view(b - 1, b + 1)[:, :-1].reshape(b, b - 1) if b > 1 else square.new_empty(b, 0)


def _with_diagonal(x: Tensor) -> Tensor:
    """``_off_diagonal``'s gradient: (B, B), 0 on the diagonal."""
    b = x.shape[0]
    if b < 2:
        return x.new_zeros(b, b)
    return torch.cat([x.new_zeros(1), torch.cat([x.view(b - 1, b), x.new_zeros(b - 1, 1)], 1).view(-1)]).view(b, b)


def forward(
    cosine: Cosine, kl: SoftmaxKL, student: Tensor, teacher: Tensor, options: CorrelationOptions, need_grad: bool
) -> tuple[Tensor, ...]:
    """The loss, and what ``backward`` needs of the cosines and of their softmax."""
    s, inverse_a, inverse_b = cosine(*view_rows(student, options.views))
    t = cosine(*view_rows(teacher, options.views))[0]
    loss, stats, scale = kl.forward(_rows(s, t, options), need_grad)
    return loss, s, inverse_a, inverse_b, t, stats, scale


def _rows(s: Tensor, t: Tensor, options: CorrelationOptions) -> Rows:
    dtype = compute_dtype(s, t)  # one of the networks may be in fp64
    s, t = (x.to(dtype) if options.views > 1 else _off_diagonal(x.to(dtype)) for x in (s, t))
    return Rows(s, t, temperature=options.temperature, reduction=options.reduction)


def backward(
    gram: Gram,
    kl: SoftmaxKL,
    grad: Tensor,
    student: Tensor,
    saved: Sequence[Tensor],
    options: CorrelationOptions,
) -> Tensor:
    """dloss/dstudent, of all columns or of any part of them, from what ``forward`` gave behind the loss."""
    s, inverse_a, inverse_b, t, stats, scale = saved
    d_s = kl.backward(grad, _rows(s, t, options), stats, scale)
    others, base = view_rows(student, options.views)
    own = inverse_a.dtype
    if student.dtype == torch.float16:  # an all-zero row's gradient is larger than it can hold: it gets none
        inverse_a, inverse_b = (i.masked_fill(i >= 1 / COSINE_EPS, 0) for i in (inverse_a, inverse_b))
    if options.views == 1:  # both sides are the same rows, whose gradients are rounded once, as a sum
        wide = student.to(own)
        d_others, d_base = gram.cosine_backward(_with_diagonal(d_s.to(own)), wide, wide, s, inverse_a, inverse_b)
        return (d_others + d_base).to(student.dtype)
    d_others, d_base = gram.cosine_backward(d_s.to(own), others, base, s, inverse_a, inverse_b)
    gradient = torch.cat([d_base[:, None], d_others.view(len(d_base), options.views - 1, -1)], dim=1)
    return gradient.view(student.shape)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    x = build(ViewRows, args)
    gram, kl = choose("gram", x.student, x.teacher), choose("softmax_kl", x.student, x.teacher)
    return forward(gram.cosine_forward, kl, *x, args[-1])


def _fake(*args: Any) -> tuple[Tensor, ...]:
    x, need_grad = build(ViewRows, args), args[-1]
    dtype, own, views = compute_dtype(x.student, x.teacher), compute_dtype(x.student), x.options.views
    images = x.student.shape[0] // views
    rows = max(views - 1, 1) * images

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return x.student.new_empty(shape, dtype=dtype)

    loss = empty(rows) if x.options.reduction == "none" else empty()
    cosines = empty(rows, images, dtype=own), empty(rows, dtype=own), empty(images, dtype=own)
    of_teacher = empty(rows, images, dtype=compute_dtype(x.teacher))
    return loss, *cosines, of_teacher, empty(STATS, rows) if need_grad else empty(0), empty()


def _backward(grad: Tensor, *args: Any) -> Tensor:
    *saved, student, views, temperature, reduction = args
    options = CorrelationOptions(views, temperature, reduction)
    s, t = saved[0], saved[3]  # the cosines, which may be in fp64 where the student is not
    gram, kl = choose("gram", student), choose("softmax_kl", s, t)
    return backward(gram, kl, grad, student, saved, options)


_SAVED = "Tensor s, Tensor inverse_a, Tensor inverse_b, Tensor t, Tensor stats, Tensor scale"
backward_op = register(
    "correlation_backward",
    f"(Tensor grad, {_SAVED}, Tensor student, {schema(CorrelationOptions)}) -> Tensor",
    _backward,
    lambda grad, *args: args[6].new_empty(args[6].shape),
)


_op = Differentiable(
    "correlation",
    ViewRows,
    f"Tensor loss, {_SAVED}",
    _forward,
    _fake,
    keep=itemgetter(0, 2, 3, 4),
    backward=backward_op,
)


def correlation(x: ViewRows) -> Tensor:
    """The view rows' divergences, reduced: float32 (float64 if an input is). Gradients flow to the student.

    Arguments are the caller's to check: correlation_loss.py does.
    """
    rows = x.student.shape[0]
    if not comparable(rows, x.options.views):
        return nothing(x.student, x.teacher, rows, x.options)
    return _op(x)
