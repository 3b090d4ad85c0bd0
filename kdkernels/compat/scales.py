"""What the presets share: the published scales and quirks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..at_loss import at_loss
from ..kd_loss import kd_loss
from ..nst_loss import nst_loss
from ..ops.checks import check_number, check_tensor, compute_dtype, layer_pairs
from ..ops.gram import LayerPairs, SPOptions, sp_gram


def kl_per_sample(
    student: Tensor, teacher: Tensor, temperature: float, *, scale_by_t2: bool = True, standardize: bool = False
) -> Tensor:
    """KL with the classes in dimension 1, summed over everything else, over N: T^2 KL for (N, C), H W times that for
    the mean over the pixels of (N, C, H, W)."""
    warn_of_trained_teacher(teacher)
    loss = partial(kd_loss, student, teacher, temperature=temperature, scale_by_t2=scale_by_t2, standardize=standardize)
    if student.dim() == 2:
        return loss()
    total = loss(class_dim=1, reduction="sum")
    return total / max(student.shape[0], 1)


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


def published_at(student: Iterable[Tensor], teacher: Iterable[Tensor], power: float) -> list[Tensor]:
    """Attention transfer of each pair of maps, all in one launch; of A^power, so that odd powers keep signs."""
    students, teachers = paired(student, teacher)
    if power % 2:
        maps = [
            (signed_unit_map(s, t, power), signed_unit_map(t.detach(), s, power))
            for s, t in zip(students, teachers, strict=True)
        ]
        return [mean((s - t).square()) for s, t in maps]
    return list(at_loss(students, teachers, p=power, layer_reduction="none").unbind()) if students else []


def published_nst(student: Iterable[Tensor], teacher: Iterable[Tensor]) -> list[Tensor]:
    """Neuron selectivity transfer of each pair of maps."""
    students, teachers = paired(student, teacher)
    return list(nst_loss(students, teachers, layer_reduction="none").unbind()) if students else []


def paired(student: Iterable[Tensor], teacher: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """As many of both as the shorter one has."""
    pairs = list(zip(student, teacher, strict=False))
    for _, t in pairs:
        warn_of_trained_teacher(t)
    return [s for s, _ in pairs], [t for _, t in pairs]


def signed_unit_map(x: Tensor, other: Tensor, power: float) -> Tensor:
    """The mean over the channels of x^power, pooled to the other's size if that is smaller, of length 1."""
    x = in_compute_dtype(x)
    if x.shape[2] > other.shape[2]:
        x = F.adaptive_avg_pool2d(x, (other.shape[2], other.shape[3]))
    return F.normalize(x.pow(power).mean(1).flatten(1))


def in_compute_dtype(x: Tensor) -> Tensor:
    """As float32, or float64 if it is."""
    return x.to(compute_dtype(x))


def mean(x: Tensor) -> Tensor:
    """The mean, of nothing 0."""
    return x.sum() / max(x.numel(), 1)


def root(x: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


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
