"""gram: the similarities inside a batch.

    sp_gram             sum over layer pairs of scale * ||G_t - G_s||_F^2,  G = Q Q^T with normalised rows
    cosine_similarity   S[i, j] = <a_i, b_j> / (|a_i| |b_j|)

Products are accumulated in fp32 (fp64 for fp64). All layers of an sp_gram call are one op, so that a backend can run
them in one launch. Only B x B matrices are saved.
"""

from __future__ import annotations

from torch import Tensor

from ..backend import choose
from ..checks import (
    check_choice,
    check_pair,
    check_positive,
    compute_dtype,
    grad_like,
    layer_pairs,
    need_grad,
)
from ..library import Op

ROW_NORMS = ("l2", "l1")


def _sp_forward(
    student: list[Tensor],
    teacher: list[Tensor],
    row_norm: str,
    scale: float,
    eps: float,
    zero_row_grad: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    implementation = choose("gram", *student, *teacher)
    return implementation.sp_forward(student, teacher, row_norm, scale, eps, zero_row_grad, need_grad)


def _sp_fake(
    student: list[Tensor],
    teacher: list[Tensor],
    row_norm: str,
    scale: float,
    eps: float,
    zero_row_grad: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    dtype, b = compute_dtype(*student, *teacher), student[0].shape[0]
    weights = (len(student), b, b) if need_grad else (0,)
    return student[0].new_empty((), dtype=dtype), student[0].new_empty(weights, dtype=dtype)


def _sp_backward(grad: Tensor, student: list[Tensor], weights: Tensor) -> list[Tensor]:
    return choose("gram", *student).sp_backward(grad, student, weights)


def _sp_backward_fake(grad: Tensor, student: list[Tensor], weights: Tensor) -> list[Tensor]:
    return [grad_like(s) for s in student]


def _cosine_forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return choose("gram", a, b).cosine_forward(a, b)


def _cosine_fake(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, n, m = compute_dtype(a, b), a.shape[0], b.shape[0]
    return a.new_empty((n, m), dtype=dtype), a.new_empty(n, dtype=dtype), a.new_empty(m, dtype=dtype)


def _cosine_backward(
    grad: Tensor, a: Tensor, b: Tensor, similarity: Tensor, inverse_a: Tensor, inverse_b: Tensor
) -> tuple[Tensor, Tensor]:
    return choose("gram", a, b).cosine_backward(grad, a, b, similarity, inverse_a, inverse_b)


def _cosine_backward_fake(grad: Tensor, a: Tensor, b: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


sp_op = Op(
    "sp_gram",
    "(Tensor[] student, Tensor[] teacher, str row_norm, float scale, float eps, bool zero_row_grad, bool need_grad)"
    " -> (Tensor loss, Tensor weights)",
    _sp_forward,
    _sp_fake,
)
sp_backward_op = Op(
    "sp_gram_backward",
    "(Tensor grad, Tensor[] student, Tensor weights) -> Tensor[]",
    _sp_backward,
    _sp_backward_fake,
)
cosine_op = Op("cosine_similarity", "(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor)", _cosine_forward, _cosine_fake)
cosine_backward_op = Op(
    "cosine_similarity_backward",
    "(Tensor grad, Tensor a, Tensor b, Tensor similarity, Tensor inverse_a, Tensor inverse_b) -> (Tensor, Tensor)",
    _cosine_backward,
    _cosine_backward_fake,
)


sp_op.set_autograd(
    inputs=lambda student, *_: student,
    saved=lambda args, outputs: ((*args[0], outputs[1]), None),
    backward=lambda grad, tensors, _: sp_backward_op(grad, list(tensors[:-1]), tensors[-1]),
    what="sp_loss",
)
cosine_op.set_autograd(
    inputs=lambda a, b: (a, b),
    saved=lambda args, outputs: ((*args, *outputs), None),
    backward=lambda grad, tensors, _: cosine_backward_op(grad, *tensors),
    what="cosine_similarity",
)


def sp_gram(
    student: Tensor | list[Tensor],
    teacher: Tensor | list[Tensor],
    *,
    row_norm: str = "l2",
    scale: float,
    eps: float = 1e-12,
    zero_row_grad: bool = False,
) -> Tensor:
    """scale * sum over layer pairs of ||G_t - G_s||_F^2; gradients flow to the student.

    Args:
        student, teacher: (B, ...) features, or sequences of them; student and teacher may differ behind B.
        row_norm: "l2" or "l1".
        zero_row_grad: let an all-zero student row pass a gradient of 1 / eps through its own normalisation, as
            the published code does; the default gives it none.
    """
    check_choice("row_norm", row_norm, ROW_NORMS)
    check_positive("eps", eps)
    students, teachers = layer_pairs(student, teacher, "sp_loss")
    teachers = [t.detach() for t in teachers]
    return sp_op.loss(students, teachers, row_norm, float(scale), float(eps), zero_row_grad, need_grad(*students))


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) cosines of the rows of a (N, D) and b (M, D); gradients flow to both. A zero row has cosine 0."""
    check_pair(a, b, "cosine_similarity")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"cosine_similarity: needs (N, D) and (M, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    return cosine_op.loss(a, b)
