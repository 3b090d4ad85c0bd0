"""The formulas behind the presets, with the scales and the quirks that the published code shares."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..kd_loss import kd_loss
from ..ops.checks import check_number, check_tensor, layer_pairs
from ..ops.gram import LayerPairs, SPOptions, sp_gram


def kl_per_sample(student: Tensor, teacher: Tensor, temperature: float, *, scale_by_t2: bool = True) -> Tensor:
    """KL with the classes in dimension 1, summed over everything else, over N: T^2 KL for (N, C), H W times that for
    the mean over the pixels of (N, C, H, W)."""
    warn_of_trained_teacher(teacher)
    if student.dim() == 2:
        return kd_loss(student, teacher, temperature=temperature, scale_by_t2=scale_by_t2)
    total = kd_loss(student, teacher, temperature=temperature, class_dim=1, reduction="sum", scale_by_t2=scale_by_t2)
    return total / max(len(student), 1)


def published_sp(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, row_norm: str = "l2", reduction: str = "batchmean"
) -> Tensor:
    """SP summed over the layer pairs, 0-d; an all-zero student row gets the published gradient, scaled by 1 / eps."""
    for t in teacher:
        warn_of_trained_teacher(t)
    students, teachers = layer_pairs(student, teacher, "sp_loss")
    reduction = "mean" if reduction == "batchmean" else "sum"
    options = SPOptions([1.0] * len(students), reduction, row_norm=row_norm, zero_row_grad=True)
    return sp_gram(LayerPairs(students, teachers, options))


def generalized_jsd(beta: float) -> dict[str, Any]:
    """The divergence that TRL and Liger mean by beta: at 0 and 1, where their JSD is 0, they switch to a KL."""
    check_number("beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    if beta in (0, 1):
        return {"divergence": "reverse" if beta else "forward"}
    return {"divergence": "jsd", "beta": float(beta)}


def warn_of_trained_teacher(teacher: Tensor) -> None:
    check_tensor("teacher", teacher)
    if teacher.requires_grad:
        warnings.warn(
            "the teacher's tensor requires a gradient and gets none from kdkernels: detach it, or keep the original "
            "loss if the teacher is to be trained through it",
            stacklevel=4,
        )
