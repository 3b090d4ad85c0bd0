"""mdistiller's losses (github.com/megvii-research/mdistiller, mdistiller/distillers): AT, DKD, KD, NST, PKT, RKD, SP.

    from kdkernels.compat.mdistiller import dkd_loss, kd_loss, sp_loss        # was: from mdistiller.distillers.KD ...

or, before training and with no other change, all of them in the distillers themselves:

    kdkernels.compat.mdistiller.patch()

``logit_stand`` is the last argument of the fork with standardised logits (github.com/sunshangquan/
logit-standardization-KD, arXiv 2403.01427); mdistiller itself has none, which is its default here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..kd_loss import kd_loss as kdkernels_kd_loss
from ..nst_loss import nst_loss as kdkernels_nst_loss
from ..ops.checks import check_pair, check_tensor, check_weight
from ..pkt_loss import pkt_loss as kdkernels_pkt_loss
from ..rkd_loss import rkd_loss as kdkernels_rkd_loss
from ..stkd_loss import stkd_loss
from . import mlld
from .patching import Patch, bare_signature
from .scales import paired, published_at, published_sp, warn_of_trained_teacher


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float, logit_stand: bool = False) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over all positions; a scalar.

    Quirk: the classes are in dimension 1, for (N, L, C) too: use ``kdkernels.kd_loss(student, teacher,
    temperature=T)``, whose ``class_dim`` is the last. ``logit_stand`` is for (N, C): the fork standardises the last
    dimension, which in other logits is not the classes'.

    Raises:
        ValueError: ``logit_stand`` with logits that are not (N, C).
    """
    check_pair(logits_student, logits_teacher, "kd_loss")
    warn_of_trained_teacher(logits_teacher)
    if logit_stand and logits_student.dim() != 2:
        raise ValueError(f"kd_loss: logit_stand needs (N, C) logits, got {tuple(logits_student.shape)}")
    return kdkernels_kd_loss(
        logits_student, logits_teacher, temperature=temperature, class_dim=1, standardize=bool(logit_stand)
    )


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    logit_stand: bool = False,
) -> Tensor:
    """Decoupled KD (arXiv 2203.08679): T^2 (alpha TCKD + beta NCKD), mean over the N samples; a scalar.

    Args:
        logits_student, logits_teacher: (N, C).
        target: int64 labels with N elements. Also, unlike the original, mixed labels: a floating-point (N, C) with one
            or two positive entries in each row, as mixup makes them without label smoothing; their classes are the
            labelled ones, however large the entries (the formula is in kdkernels/stkd_loss.py).
        alpha, beta: weights of the target class and of the others, not negative; 1 and 8 in the CIFAR-100 recipe.

    Quirk: the warm-up of the weight over the first epochs is the trainer's, not the loss's. Use
    ``kdkernels.stkd_loss(student, teacher, target, ce_weight=1, kd_weight=1, decouple=(alpha, beta))``: the cross
    entropy, and mixed labels without a dense target, in the same pass.

    Raises:
        ValueError: a dense target with three or more positive entries in a row, or none. (On an accelerator targets
            are not read back to be checked: such a row makes the loss NaN.)
    """
    check_pair(logits_student, logits_teacher, "dkd_loss")
    check_tensor("dkd_loss: target", target)
    alpha, beta = float(alpha), float(beta)
    check_weight("dkd_loss", alpha=alpha, beta=beta)
    warn_of_trained_teacher(logits_teacher)
    target_mixed = lam = None
    if target.is_floating_point():
        target, target_mixed = _labelled(target, logits_student)
        lam = torch.full((), 0.5, device=target.device)  # the terms depend on which classes are labelled, not on it
    return stkd_loss(
        logits_student,
        logits_teacher,
        target.reshape(-1),
        target_mixed,
        lam,
        temperature=temperature,
        ce_weight=0.0,
        kd_weight=1.0,
        decouple=(alpha, beta),
        standardize=bool(logit_stand),
    )


def sp_loss(g_s: Iterable[Tensor], g_t: Iterable[Tensor]) -> Tensor | int:
    """L_SP = ||G_t - G_s||_F^2 / B^2, summed over the pairs of features (B, ...), in one launch.

    Quirk: the result has shape (1,), and no pairs give the int 0: use ``kdkernels.sp_loss(g_s, g_t)``, a scalar.
    Quirk: if the lists differ in length, the shorter one counts.
    """
    pairs = list(zip(g_s, g_t, strict=False))
    if not pairs:
        return 0
    students, teachers = zip(*pairs, strict=True)
    return published_sp(students, teachers).view(1)


def rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> Tensor:
    """RKD's distances and angles of features (B, ...); a scalar: ``kdkernels.rkd_loss``."""
    warn_of_trained_teacher(f_t)
    return kdkernels_rkd_loss(
        f_s, f_t, distance_weight=distance_weight, angle_weight=angle_weight, squared=squared, eps=eps
    )


def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """Probabilistic knowledge transfer of features (B, d), mean over the B^2 pairs: ``kdkernels.pkt_loss``."""
    warn_of_trained_teacher(f_t)
    return kdkernels_pkt_loss(f_s, f_t, eps=eps)


def at_loss(g_s: Iterable[Tensor], g_t: Iterable[Tensor], p: float) -> Tensor | int:
    """Attention transfer, summed over the pairs of maps (B, C, H, W); a scalar.

    Quirks: those of ``kdkernels.compat.repdistiller.Attention``; no pairs give the int 0.
    """
    return sum(published_at(g_s, g_t, p))


def nst_loss(g_s: Iterable[Tensor], g_t: Iterable[Tensor]) -> Tensor | int:
    """Neuron selectivity transfer, summed over the pairs of maps (B, C, H, W); a scalar.

    Quirk: if the lists differ in length, the shorter one counts; no pairs give the int 0.
    """
    students, teachers = paired(g_s, g_t)
    return kdkernels_nst_loss(students, teachers) if students else 0


def _labelled(target: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The one or two classes of each row of a dense target; one class twice where there is one."""
    if target.shape != logits.shape:
        raise ValueError(
            f"dkd_loss: a dense target must have the logits' shape {tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    positive = (target > 0).sum(1)
    wrong = (positive == 0) | (positive > 2)
    if wrong.device.type == "cpu" and bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"dkd_loss: a dense target must have one or two positive entries in each row, got {int(positive[row])} in "
            f"row {row} (make it without label smoothing)"
        )
    order = target.argsort(dim=1, descending=True)
    first = order[:, 0]
    second = torch.where(positive == 2, order[:, min(1, order.shape[1] - 1)], first)
    return torch.where(wrong, logits.shape[1], first), second


_PATCH = Patch(
    "mdistiller.distillers",
    {
        "kd_loss": {
            "(logits_student, logits_teacher, temperature)": kd_loss,
            "(logits_student_in, logits_teacher_in, temperature, logit_stand)": kd_loss,
            # the forks' KD_ours.py and MLKD.py
            "(logits_student, logits_teacher, temperature, reduce=True)": mlld.kd_loss,
            "(logits_student_in, logits_teacher_in, temperature, reduce=True, logit_stand=False)": mlld.kd_loss,
        },
        "dkd_loss": {
            "(logits_student, logits_teacher, target, alpha, beta, temperature)": dkd_loss,
            "(logits_student_in, logits_teacher_in, target, alpha, beta, temperature, logit_stand)": dkd_loss,
        },
        "cc_loss": {"(logits_student, logits_teacher, temperature, reduce=True)": mlld.cc_loss},
        "bc_loss": {"(logits_student, logits_teacher, temperature, reduce=True)": mlld.bc_loss},
        **{loss.__name__: {bare_signature(loss): loss} for loss in (at_loss, nst_loss, pkt_loss, rkd_loss, sp_loss)},
    },
    {
        "kdsvd_loss": "its singular value decompositions are its time",
        "vid_loss": "its convolutions are its time",
        "feat_loss": "OFD: elementwise, and its connectors are its time",
        "hcl_loss": "ReviewKD: pooled mean squared errors, which PyTorch has",
        "FitNet": "a mean squared error, which PyTorch has",
        "ContrastLoss": "CRD: not here yet",
    },
)


def patch() -> None:
    """Replace the functions that mdistiller's distillers call by ours, and print what was replaced and what was left.

    Each is recognised by its name and its arguments: the forks' ``kd_loss(..., temperature, reduce, logit_stand)`` of
    MLKD.py becomes ``kdkernels.compat.mlld.kd_loss``, and a function with arguments that are not known is left.
    """
    _PATCH.apply()


def unpatch() -> None:
    """Put mdistiller's own functions back."""
    _PATCH.undo()
