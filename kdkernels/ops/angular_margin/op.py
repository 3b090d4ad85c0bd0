"""angular_margin: per layer, the distance between the angular maps of student and teacher, and its gradient.

One read of each activation gives its channel-energy map (B, H, W); everything after that is work on the small maps.
What is saved is one number per pixel, kappa, with dloss/dA[c, n] = kappa[n] A[c, n]. All layers of a call are one op,
so that a backend can run them in one launch.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..backend import choose
from ..checks import check_positive, check_weight, compute_dtype, grad_like, layer_pairs, need_grad
from ..library import Op


def _forward(
    student: list[Tensor],
    teacher: list[Tensor],
    layer_weights: list[float],
    margin: float,
    scale: float,
    local_weight: float,
    reduce: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    implementation = choose("angular_margin", *student, *teacher)
    return implementation.forward(student, teacher, layer_weights, margin, scale, local_weight, reduce, need_grad)


def _forward_fake(
    student: list[Tensor],
    teacher: list[Tensor],
    layer_weights: list[float],
    margin: float,
    scale: float,
    local_weight: float,
    reduce: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(*student, *teacher)
    pixels = sum(math.prod((s.shape[0], *s.shape[2:])) for s in student) if need_grad else 0
    first = student[0]
    return first.new_empty(() if reduce else (len(student),), dtype=dtype), first.new_empty(pixels, dtype=dtype)


def _backward(grad: Tensor, student: list[Tensor], kappa: Tensor) -> list[Tensor]:
    return choose("angular_margin", *student).backward(grad, student, kappa)


def _backward_fake(grad: Tensor, student: list[Tensor], kappa: Tensor) -> list[Tensor]:
    return [grad_like(s) for s in student]


forward_op = Op(
    "angular_margin",
    "(Tensor[] student, Tensor[] teacher, float[] layer_weights, float margin, float scale, float local_weight, "
    "bool reduce, bool need_grad) -> (Tensor loss, Tensor kappa)",
    _forward,
    _forward_fake,
)
backward_op = Op(
    "angular_margin_backward",
    "(Tensor grad, Tensor[] student, Tensor kappa) -> Tensor[]",
    _backward,
    _backward_fake,
)


forward_op.set_autograd(
    inputs=lambda student, *_: student,
    saved=lambda args, outputs: ((*args[0], outputs[1]), None),
    backward=lambda grad, tensors, _: backward_op(grad, list(tensors[:-1]), tensors[-1]),
    what="amd_loss",
)


def check_options(margin: float, scale: float, local_weight: float) -> None:
    check_positive("margin", margin)
    check_positive("scale", scale)
    check_weight("local_weight", local_weight)
    if margin > 2:
        raise ValueError(f"margin must be in (0, 2], got {margin}")
    if local_weight > 1:
        raise ValueError(f"local_weight must be in [0, 1], got {local_weight}")


def angular_margin(
    student: Tensor | list[Tensor],
    teacher: Tensor | list[Tensor],
    *,
    margin: float,
    scale: float,
    local_weight: float = 0.0,
    layer_weights: list[float],
    reduce: bool = True,
) -> Tensor:
    """The layers' losses times their weights: summed, or (L,) with reduce=False. Gradients flow to the student.

    Args:
        student, teacher: (B, C, H, W) activations, or sequences of them; H and W of a pair are equal, C is free.
    """
    check_options(margin, scale, local_weight)
    students, teachers = layer_pairs(student, teacher, "amd_loss")
    for s, t in zip(students, teachers, strict=True):
        if s.dim() != 4 or t.dim() != 4 or s.shape[2:] != t.shape[2:]:
            raise ValueError(
                f"amd_loss: student and teacher must be (B, C, H, W) with the same H and W, got {tuple(s.shape)} and "
                f"{tuple(t.shape)}"
            )
        if local_weight and min(s.shape[2:]) < 2:
            raise ValueError(f"amd_loss: quadrants (local_weight > 0) need H and W of 2 or more, got {tuple(s.shape)}")
    if len(layer_weights) != len(students):
        raise ValueError(f"layer_weights has {len(layer_weights)} numbers for {len(students)} layers")
    return forward_op.loss(
        students,
        [t.detach() for t in teachers],
        [float(x) for x in layer_weights],
        float(margin),
        float(scale),
        float(local_weight),
        reduce,
        need_grad(*students),
    )
