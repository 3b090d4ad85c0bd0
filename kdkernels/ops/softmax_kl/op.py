"""softmax_kl: rows of student and teacher logits to the weighted sum of four terms per row, and its gradient.

    row = w_ce CE + w_kl KL + w_target TCKD + w_other NCKD

    CE    = -sum_k y_k log p_s,k                                    y from up to two labels, or dense
    KL    = sum_k q_t,k log(q_t,k / q_s,k),  q = softmax(z / T)      = TCKD + S_t NCKD
    TCKD  = sum over the labelled classes of q_t log(q_t / q_s), plus S_t log(S_t / S_s), S = the mass of the others
    NCKD  = KL of the other classes, renormalised

The weights are inside the op so that a whole loss is one pass over the logits, and its gradient another.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_pair, check_positive, compute_dtype, need_grad
from ..library import Op

STATS, STATS_DECOUPLED = 5, 9  # saved numbers per row: two maxima and three log-sums; four more for the rest


def _check_values(target: Tensor | None, target_mixed: Tensor | None, ignore_index: int, classes: int) -> None:
    """Raise for a label out of range, whose row is NaN. On the CPU alone: reading values would stall an accelerator."""
    for name, labels in (("target", target), ("target_mixed", target_mixed)):
        if labels is None or labels.is_floating_point():
            continue
        bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
        if bad.numel():
            raise ValueError(
                f"softmax_kl: {name} has label {int(bad[0])}; valid are 0..{classes - 1}, and {ignore_index} to ignore"
            )


def _forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    target_mixed: Tensor | None,
    lam: Tensor | None,
    temperature: float,
    weights: list[float],
    ignore_index: int,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = choose("softmax_kl", student, teacher)
    outputs = implementation.forward(
        student, teacher, target, target_mixed, lam, temperature, weights, ignore_index, reduction, need_grad
    )
    if target is not None and target.is_cpu:
        loss = outputs[0]
        if math.isnan((loss.sum() if loss.dim() else loss).item()):
            _check_values(target, target_mixed, ignore_index, student.shape[1])
    return outputs


def _forward_fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    target_mixed: Tensor | None,
    lam: Tensor | None,
    temperature: float,
    weights: list[float],
    ignore_index: int,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, n = compute_dtype(student, teacher), student.shape[0]
    stats = (STATS_DECOUPLED if weights[2] or weights[3] else STATS, n) if need_grad else (0,)
    loss = student.new_empty((n,) if reduction == "none" else (), dtype=dtype)
    return loss, student.new_empty(stats, dtype=dtype), student.new_empty((), dtype=dtype)


def _backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    target_mixed: Tensor | None,
    lam: Tensor | None,
    stats: Tensor,
    scale: Tensor,
    temperature: float,
    weights: list[float],
    ignore_index: int,
) -> Tensor:
    implementation = choose("softmax_kl", student, teacher)
    return implementation.backward(
        grad, student, teacher, target, target_mixed, lam, stats, scale, temperature, weights, ignore_index
    )


def _backward_fake(grad: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape)


_LABELS = "Tensor? target, Tensor? target_mixed, Tensor? lam"
forward_op = Op(
    "softmax_kl",
    f"(Tensor student, Tensor teacher, {_LABELS}, float temperature, float[] weights, int ignore_index, "
    "str reduction, bool need_grad) -> (Tensor loss, Tensor stats, Tensor scale)",
    _forward,
    _forward_fake,
)
backward_op = Op(
    "softmax_kl_backward",
    f"(Tensor grad, Tensor student, Tensor teacher, {_LABELS}, Tensor stats, Tensor scale, float temperature, "
    "float[] weights, int ignore_index) -> Tensor",
    _backward,
    _backward_fake,
)


def _saved(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Any, Any]:
    student, teacher, target, target_mixed, lam, temperature, weights, ignore_index, _, _ = args
    _, stats, scale = outputs
    return (student, teacher, target, target_mixed, lam, stats, scale), (temperature, weights, ignore_index)


forward_op.set_autograd(
    inputs=lambda student, *_: (student,),
    saved=_saved,
    backward=lambda grad, tensors, options: (backward_op(grad, *tensors, *options),),
    what="softmax_kl",
)


def softmax_kl(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    target_mixed: Tensor | None = None,
    lam: Tensor | None = None,
    *,
    temperature: float,
    ce_weight: float = 0.0,
    kl_weight: float = 0.0,
    target_weight: float = 0.0,
    other_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
) -> Tensor:
    """The weighted terms of the module's formula over rows.

    Args:
        student, teacher: (N, C) logits, float16, bfloat16, float32 or float64, any strides. The teacher is a constant.
        target: (N,) int64 labels, or a dense (N, C) floating-point target for the CE term; needed by every term but KL.
        target_mixed, lam: (N,) second labels, and the weight of the first: a tensor of shape () or (N,).
        ignore_index: rows with this label in either place count for nothing: not in the mean, zero gradient.
        reduction: "batchmean" (over the rows that are not ignored; 0 for none), "sum", "none" (N,).

    Returns:
        float32 (float64 if an input is), whatever the inputs' dtype.
    """
    check_pair(student, teacher, "softmax_kl")
    if student.dim() != 2 or student.shape != teacher.shape or student.shape[1] < 1:
        raise ValueError(
            f"softmax_kl: student and teacher must both be (N, C), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    check_positive("temperature", temperature)
    if target is None and (ce_weight or target_weight or other_weight):
        raise ValueError("softmax_kl: target is None, but a weighted term needs labels")
    if target is not None:
        _check_labels(student, target, target_mixed, lam, dense_allowed=not (target_weight or other_weight))
    elif target_mixed is not None or lam is not None:
        raise ValueError("softmax_kl: target_mixed and lam need a target")
    teacher = teacher.detach()
    weights = [float(ce_weight), float(kl_weight), float(target_weight), float(other_weight)]
    return forward_op.loss(
        student,
        teacher,
        target,
        target_mixed,
        lam,
        float(temperature),
        weights,
        ignore_index,
        reduction,
        need_grad(student),
    )


def _check_labels(
    student: Tensor, target: Tensor, target_mixed: Tensor | None, lam: Tensor | None, dense_allowed: bool
) -> None:
    rows, shape = student.shape[0], tuple(student.shape)
    for name, x in (("target", target), ("target_mixed", target_mixed), ("lam", lam)):
        if x is not None and x.device != student.device:
            raise ValueError(f"{name} is on {x.device} and the logits are on {student.device}; move one of them")
    if target.is_floating_point():
        if not dense_allowed:
            raise ValueError("decoupled terms need integer labels, got a dense floating-point target")
        if target.shape != student.shape or target_mixed is not None or lam is not None:
            raise ValueError(
                f"a dense target must have the logits' shape {shape} and comes without target_mixed and lam, "
                f"got {tuple(target.shape)}"
            )
        return
    for name, x in (("target", target), ("target_mixed", target_mixed)):
        if x is not None and x.dtype != torch.int64:
            raise TypeError(f"{name} must be int64 class indices, got {x.dtype}")
        if x is not None and x.shape != (rows,):
            raise ValueError(f"{name} must have shape ({rows},) for logits {shape}, got {tuple(x.shape)}")
    if (target_mixed is None) != (lam is None):
        raise ValueError("target_mixed and lam go together: give both or neither")
    if lam is not None and (not lam.is_floating_point() or (lam.dim() and lam.shape != (rows,))):
        raise ValueError(f"lam must be a floating-point tensor of shape () or ({rows},), got {tuple(lam.shape)}")
