"""Multi-Level Logit Distillation's functions (github.com/Jin-Ying/Multi-Level-Logit-Distillation,
mdistiller/distillers/KD_ours.py; the same in MLKD.py of github.com/sunshangquan/logit-standardization-KD).

    from kdkernels.compat.mlld import bc_loss, cc_loss, kd_loss        # was: from .KD_ours import ...

``kd_loss`` here is not that of ``kdkernels.compat.mdistiller``: its fourth argument is ``reduce``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kd_loss import kd_loss as kdkernels_kd_loss
from ..ops.checks import check_pair, check_positive, check_rows
from ..ops.multi_level import Levels, multi_level
from .scales import in_compute_dtype, warn_of_trained_teacher


def kd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    temperature: float,
    reduce: bool = True,
    logit_stand: bool = False,
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)): the mean over N, or (N,) with ``reduce=False``.

    Quirk: the authors' trainer multiplies the mean by its mask and averages again, which is the mean times the share
    of rows that the mask keeps.
    """
    check_pair(logits_student, logits_teacher, "kd_loss")
    warn_of_trained_teacher(logits_teacher)
    if logit_stand and logits_student.dim() != 2:
        raise ValueError(f"kd_loss: logit_stand needs (N, C) logits, got {tuple(logits_student.shape)}")
    return kdkernels_kd_loss(
        logits_student,
        logits_teacher,
        temperature=temperature,
        reduction="mean" if reduce else "none",
        class_dim=1,
        standardize=bool(logit_stand),
    )


def cc_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float, reduce: bool = True) -> Tensor:
    """|P_t^T P_t - P_s^T P_s|_F^2 / C of the probabilities at T (N, C); the (C, C) terms with ``reduce=False``."""
    return _gram_loss(logits_student, logits_teacher, temperature, reduce, of_classes=True)


def bc_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float, reduce: bool = True) -> Tensor:
    """|P_t P_t^T - P_s P_s^T|_F^2 / N of the probabilities at T (N, C); the (N, N) terms with ``reduce=False``."""
    return _gram_loss(logits_student, logits_teacher, temperature, reduce, of_classes=False)


def _gram_loss(student: Tensor, teacher: Tensor, temperature: float, reduce: bool, *, of_classes: bool) -> Tensor:
    check_rows(student, teacher, "cc_loss" if of_classes else "bc_loss", same_width=True)
    check_positive(temperature=temperature)
    warn_of_trained_teacher(teacher)
    if reduce:
        weights = {"class_weight" if of_classes else "batch_weight": 1.0}
        return multi_level(Levels(student, teacher.detach(), [float(temperature)], [0.0], **weights, quantile=1.0))
    with torch.autocast(student.device.type, enabled=False):
        p_s, p_t = (torch.softmax(in_compute_dtype(z) / temperature, 1) for z in (student, teacher.detach()))
        grams = [p.T @ p if of_classes else p @ p.T for p in (p_s, p_t)]
    return (grams[1] - grams[0]).square() / max(len(grams[0]), 1)
