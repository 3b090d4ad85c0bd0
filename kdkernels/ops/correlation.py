"""correlation: MLKD's correlation loss as one op and one node of autograd.

    S[a, j] = cos(view row a, base row j) of the student, T of the teacher
    loss = mean_a KL(softmax(T / tau) || softmax(S / tau))

It has no kernels of its own: it runs those of gram and softmax_kl one after the other, without autograd between them,
whose bookkeeping would take longer than they do on batches of ordinary size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose
from .checks import compute_dtype, need_grad
from .library import Op
from .softmax_kl.op import STATS

_KL = [0.0, 1.0, 0.0, 0.0]  # softmax_kl's weights of its terms
_NO_LABELS = (None, None, None)
_IGNORE = -100


def view_rows(x: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """The view rows ((V - 1) B, d) and the base rows (B, d) of (V B, d), row V b + r being view r of image b."""
    rows, width = x.shape
    images = x.view(rows // views, views, width)
    return images.narrow(1, 1, views - 1).reshape(-1, width), images.select(1, 0)


def _forward(
    student: Tensor, teacher: Tensor, views: int, temperature: float, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gram = choose("gram", student, teacher)
    s, inverse_a, inverse_b = gram.cosine_forward(*view_rows(student, views))
    t = gram.cosine_forward(*view_rows(teacher, views))[0]
    if s.dtype != t.dtype:  # one of the networks in fp64
        s, t = s.to(compute_dtype(s, t)), t.to(compute_dtype(s, t))
    kl = choose("softmax_kl", s, t)
    loss, stats, scale = kl.forward(s, t, *_NO_LABELS, temperature, _KL, _IGNORE, "batchmean", need_grad)
    return loss, s, inverse_a, inverse_b, t, stats, scale


def _forward_fake(
    student: Tensor, teacher: Tensor, views: int, temperature: float, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, images = compute_dtype(student, teacher), student.shape[0] // views
    rows = (views - 1) * images

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return student.new_empty(shape, dtype=dtype)

    own = compute_dtype(student)
    norms = empty(rows, dtype=own), empty(images, dtype=own)
    stats = empty(STATS, rows) if need_grad else empty(0)
    return empty(), empty(rows, images), *norms, empty(rows, images), stats, empty()


def _backward(
    grad: Tensor,
    student: Tensor,
    s: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    t: Tensor,
    stats: Tensor,
    scale: Tensor,
    views: int,
    temperature: float,
) -> Tensor:
    d_s = choose("softmax_kl", s, t).backward(grad, s, t, *_NO_LABELS, stats, scale, temperature, _KL, _IGNORE)
    others, base = view_rows(student, views)
    own = inverse_a.dtype
    d_others, d_base = choose("gram", student).cosine_backward(
        d_s.to(own), others, base, s.to(own), inverse_a, inverse_b
    )
    return torch.cat([d_base[:, None], d_others.view(len(d_base), views - 1, -1)], dim=1).view(student.shape)


def _backward_fake(grad: Tensor, student: Tensor, *rest: object) -> Tensor:
    return student.new_empty(student.shape)


forward_op = Op(
    "correlation",
    "(Tensor student, Tensor teacher, int views, float temperature, bool need_grad)"
    " -> (Tensor loss, Tensor s, Tensor inverse_a, Tensor inverse_b, Tensor t, Tensor stats, Tensor scale)",
    _forward,
    _forward_fake,
)
backward_op = Op(
    "correlation_backward",
    "(Tensor grad, Tensor student, Tensor s, Tensor inverse_a, Tensor inverse_b, Tensor t, Tensor stats, Tensor scale,"
    " int views, float temperature) -> Tensor",
    _backward,
    _backward_fake,
)
forward_op.set_autograd(
    inputs=lambda student, *_: (student,),
    saved=lambda args, outputs: ((args[0], *outputs[1:]), args[2:4]),
    backward=lambda grad, tensors, options: (backward_op(grad, *tensors, *options),),
    what="correlation_loss",
)


def correlation(student: Tensor, teacher: Tensor, *, views: int, temperature: float) -> Tensor:
    """The module's loss of (V B, d) rows, V of 2 or more and B of 1 or more; gradients flow to the student.

    Returns:
        float32 (float64 if an input is).
    """
    return forward_op.loss(student, teacher.detach(), views, float(temperature), need_grad(student))
