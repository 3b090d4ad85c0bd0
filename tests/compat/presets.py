"""The table of kdkernels.compat: each preset, the original's formula, shapes of inputs and result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import originals
import torch
import torch.nn.functional as F
from checking import DEVICE
from torch import Tensor

from kdkernels.compat import kd_zoo, mdistiller, repdistiller, torchdistill

N, C, T = 6, 10, 4.0
LABELS = torch.tensor([3, 0, 9, 3, 1, 7])
ONE_HOT = F.one_hot(LABELS, C).bool()
TORCHDISTILL_KD = ("fc", "output", "head", "input", T)

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def io(path: str, kind: str, x: Tensor) -> dict[str, dict[str, Tensor]]:
    return {path: {kind: x}, "other": {}}


def torchdistill_kd(options: dict[str, Any], targets: bool = True) -> Loss:
    def loss(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
        module = torchdistill.KDLoss(*TORCHDISTILL_KD, **options)
        labels = LABELS.to(s[0].device) if targets else None
        return module(io("fc", "output", s[0]), io("head", "input", t[0]), labels, "ignored", supp_dict=None)

    return loss


def torchdistill_sp(reduction: str) -> Loss:
    module = torchdistill.SPKDLoss("layer4", teacher_output_path="stage.3", reduction=reduction, unknown=1)
    return lambda s, t: module(io("layer4", "output", s[0]), io("stage.3", "output", t[0]), None, supp_dict={})


def mixed_kd(s: Tensor, t: Tensor, alpha: float, beta: float, reduction: str = "mean") -> Tensor:
    soft = originals.kl(s, t, T).sum() / (N if reduction == "mean" else 1)
    return alpha * F.cross_entropy(s, LABELS.to(s.device), reduction=reduction) + beta * T**2 * soft


def dkd(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
    return originals.dkd(s[0], t[0], ONE_HOT.to(s[0].device), 1.0, 8.0, T)


# name: ours, the original's formula, shapes of the student's and the teacher's tensors, shape of the result
LOGITS, MAPS = [(N, C)], [(N, C, 3, 2)]
ONE = [(N, 4, 3, 3)], [(N, 5, 2, 2)]
TWO = [(N, 4, 3, 3), (N, 7)], [(N, 5, 2, 2), (N, 3, 4)]
PRESETS: dict[str, tuple[Loss, Loss, list[tuple[int, ...]], list[tuple[int, ...]], tuple[int, ...]]] = {
    "repdistiller.DistillKL": (
        lambda s, t: repdistiller.DistillKL(T)(s[0], t[0]),
        lambda s, t: originals.distill_kl(s[0], t[0], T),
        LOGITS,
        LOGITS,
        (),
    ),
    "repdistiller.DistillKL on maps": (
        lambda s, t: repdistiller.DistillKL(T)(s[0], t[0]),
        lambda s, t: originals.distill_kl(s[0], t[0], T),
        MAPS,
        MAPS,
        (),
    ),
    "repdistiller.Similarity": (
        lambda s, t: sum(repdistiller.Similarity()(s, t)),
        lambda s, t: sum(originals.sp(a, b) for a, b in zip(s, t, strict=True)).view(1) / N**2,
        *TWO,
        (1,),
    ),
    "mdistiller.kd_loss": (
        lambda s, t: mdistiller.kd_loss(s[0], t[0], T),
        lambda s, t: T**2 * originals.kl(s[0], t[0], T).mean(),
        LOGITS,
        LOGITS,
        (),
    ),
    "mdistiller.kd_loss on maps": (
        lambda s, t: mdistiller.kd_loss(s[0], t[0], temperature=T),
        lambda s, t: T**2 * originals.kl(s[0], t[0], T).mean(),
        MAPS,
        MAPS,
        (),
    ),
    "mdistiller.kd_loss, logit_stand": (
        lambda s, t: mdistiller.kd_loss(s[0], t[0], 2.0, True),
        lambda s, t: 4 * originals.kl(originals.standardised(s[0]), originals.standardised(t[0]), 2.0).mean(),
        LOGITS,
        LOGITS,
        (),
    ),
    "mdistiller.dkd_loss": (
        lambda s, t: mdistiller.dkd_loss(s[0], t[0], LABELS.to(s[0].device), 1.0, 8.0, T),
        dkd,
        LOGITS,
        LOGITS,
        (),
    ),
    "mdistiller.dkd_loss, (N, 1) labels": (
        lambda s, t: mdistiller.dkd_loss(s[0], t[0], LABELS.to(s[0].device)[:, None], 1.0, 8.0, T),
        dkd,
        LOGITS,
        LOGITS,
        (),
    ),
    "mdistiller.dkd_loss, logit_stand": (
        lambda s, t: mdistiller.dkd_loss(s[0], t[0], LABELS.to(s[0].device), 1.0, 8.0, T, True),
        lambda s, t: dkd([originals.standardised(s[0])], [originals.standardised(t[0])]),
        LOGITS,
        LOGITS,
        (),
    ),
    "mdistiller.sp_loss": (
        mdistiller.sp_loss,
        lambda s, t: sum(originals.sp(a, b) for a, b in zip(s, t, strict=True)).view(1) / N**2,
        *TWO,
        (1,),
    ),
    "kd_zoo.SoftTarget": (
        lambda s, t: kd_zoo.SoftTarget(T)(s[0], t[0]),
        lambda s, t: originals.distill_kl(s[0], t[0], T),
        LOGITS,
        LOGITS,
        (),
    ),
    "kd_zoo.SoftTarget on maps": (
        lambda s, t: kd_zoo.SoftTarget(T)(s[0], t[0]),
        lambda s, t: originals.distill_kl(s[0], t[0], T),
        MAPS,
        MAPS,
        (),
    ),
    "kd_zoo.SP": (
        lambda s, t: kd_zoo.SP()(s[0], t[0]),
        lambda s, t: originals.sp(s[0], t[0]) / N**2,
        *ONE,
        (),
    ),
    "torchdistill.KDLoss": (
        torchdistill_kd({"alpha": 0.3}),
        lambda s, t: mixed_kd(s[0], t[0], 0.3, 0.7),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, beta": (
        torchdistill_kd({"alpha": 0.3, "beta": 2.0}),
        lambda s, t: mixed_kd(s[0], t[0], 0.3, 2.0),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, sum": (
        torchdistill_kd({"alpha": 0.3, "reduction": "sum"}),
        lambda s, t: mixed_kd(s[0], t[0], 0.3, 0.7, "sum"),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, label smoothing": (
        torchdistill_kd({"alpha": 0.3, "label_smoothing": 0.1}),
        lambda s, t: (
            mixed_kd(s[0], t[0], 0.0, 0.7) + 0.3 * F.cross_entropy(s[0], LABELS.to(s[0].device), label_smoothing=0.1)
        ),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, alpha 0": (
        torchdistill_kd({"alpha": 0, "beta": 5.0}),
        lambda s, t: originals.kl(s[0], t[0], T).mean(),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, alpha None": (
        torchdistill_kd({"beta": 1}),
        lambda s, t: originals.kl(s[0], t[0], T).mean(),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, no targets": (
        torchdistill_kd({"alpha": 0.5}, targets=False),
        lambda s, t: originals.kl(s[0], t[0], T).sum() / N,
        MAPS,
        MAPS,
        (),
    ),
    "torchdistill.KDLoss, mean": (
        torchdistill_kd({"alpha": 0, "reduction": "mean"}),
        lambda s, t: originals.kl(s[0], t[0], T).sum() / s[0].numel(),
        MAPS,
        MAPS,
        (),
    ),
    "torchdistill.SPKDLoss": (
        torchdistill_sp("batchmean"),
        lambda s, t: originals.sp(s[0], t[0], norm=1) / N**2,
        *ONE,
        (),
    ),
    "torchdistill.SPKDLoss, any other reduction": (
        torchdistill_sp("mean"),
        lambda s, t: originals.sp(s[0], t[0], norm=1),
        *ONE,
        (),
    ),
}


def draw(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [(2 * torch.randn(shape)).to(DEVICE, dtype) for shape in shapes]
