"""What the accuracy tables are made of: losses, and states of a student and its teacher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import kdkernels as kd

Loss = Callable[[list[Tensor], list[Tensor]], Tensor]


class AccuracyCase(NamedTuple):
    """A loss of lists of tensors, the student's and the teacher's."""

    name: str
    loss: Loss
    shapes: list[tuple[int, ...]]
    scale: float = 1.0  # of normal numbers
    positive: bool = False  # as behind a ReLU
    scores: bool = False  # logits, which have a temperature: options of the loss


ROWS, CLASSES = 32, 100
LABELS = torch.arange(ROWS) * 7 % CLASSES
OTHERS = (LABELS + 3) % CLASSES


def _one(loss: Callable[..., Tensor], **options: object) -> Loss:
    return lambda s, t: loss(s[0], t[0], **options)


def _all(loss: Callable[..., Tensor], **options: object) -> Loss:
    return lambda s, t: loss(s, t, **options)


def _linear(s: list[Tensor], t: list[Tensor]) -> Tensor:
    return kd.linear_kd_loss(kd.Head(s[0], s[1]), kd.Head(t[0], t[1]), temperature=2.0)


def logit_cases(temperature: float | None = None) -> list[AccuracyCase]:
    """Losses of logits, at their usual temperatures or at this one."""
    warm = {} if temperature is None else {"temperature": temperature}
    distil = partial(kd.stkd_loss, target=LABELS, ce_weight=0.0, kd_weight=1.0, **warm)
    mixed = partial(distil, target_mixed=OTHERS, lam=torch.full((ROWS,), 0.7))
    losses: dict[str, Loss] = {
        "kd": _one(kd.kd_loss, **warm),
        "kd, reverse": _one(kd.kd_loss, divergence="reverse", **warm),
        "kd, jsd": _one(kd.kd_loss, divergence="jsd", **warm),
        "kd, skew": _one(kd.kd_loss, divergence="skew", beta=0.1, **warm),
        "kd, skew_reverse": _one(kd.kd_loss, divergence="skew_reverse", beta=0.1, **warm),
        "kd, standardize": _one(kd.kd_loss, standardize=True, **warm),
        "stkd, TCKD": _one(distil, decouple=(1.0, 0.0)),
        "stkd, TCKD of two labels": _one(mixed, decouple=(1.0, 0.0)),
        "stkd, NCKD": _one(distil, decouple=(0.0, 1.0)),
        "dist": _one(kd.dist_loss, **warm),
        "nkd": _one(kd.nkd_loss, target=LABELS, **warm),
    }
    if temperature is None:
        losses["mlld"] = _one(kd.mlld_loss)
    return [AccuracyCase(name, loss, [(ROWS, CLASSES)], 3.0, scores=True) for name, loss in losses.items()]


def feature_cases() -> list[AccuracyCase]:
    rows, images = [(24, 200)], [(32, 96)]
    return [
        AccuracyCase("cwd", _one(kd.cwd_loss), [(2, 5, 8, 8)], 3.0),
        AccuracyCase("linear_kd", _linear, [(16, 32), (300, 32)], 0.6),
        AccuracyCase("sp", _all(kd.sp_loss), [(24, 1200)], positive=True),
        AccuracyCase("amd, 8 x 8", _all(kd.amd_loss), [(4, 16, 8, 8)], positive=True),
        AccuracyCase("amd, 56 x 56", _all(kd.amd_loss), [(2, 8, 56, 56)], positive=True),
        AccuracyCase("at", _all(kd.at_loss), [(4, 16, 8, 8)], positive=True),
        AccuracyCase("ft", _all(kd.ft_loss), [(4, 16, 8, 8)], positive=True),
        AccuracyCase("nst", _all(kd.nst_loss), [(3, 16, 8, 8)], positive=True),
        AccuracyCase("fsp", _all(kd.fsp_loss), [(3, 8, 8, 8), (3, 12, 8, 8)], positive=True),
        AccuracyCase("ickd", _all(kd.ickd_loss), [(3, 16, 8, 8)], positive=True),
        AccuracyCase("alignment", _one(kd.alignment_loss), images),
        AccuracyCase("correlation", _one(kd.correlation_loss), images),
        AccuracyCase("correlation, 1 view", _one(kd.correlation_loss, views=1), images),
        AccuracyCase("rkd", _one(kd.rkd_loss), rows),
        AccuracyCase("pkt", _one(kd.pkt_loss), rows),
        AccuracyCase("cc", _one(kd.cc_loss), rows),
        AccuracyCase("irg", _one(kd.irg_loss), rows),
        AccuracyCase("neighbour_correlation", _one(kd.neighbour_correlation_loss), rows),
    ]


def cases() -> list[AccuracyCase]:
    return [*logit_cases(), *feature_cases()]


def inputs(
    case: AccuracyCase, noise: float | None = None, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Student and teacher in fp64, of numbers that dtype has: independent, or that much noise apart."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * case.scale

    teacher = [normal(shape) for shape in case.shapes]
    other = [normal(shape) for shape in case.shapes]
    student = other if noise is None else [t + noise * o for t, o in zip(teacher, other, strict=True)]
    if case.positive:
        student, teacher = ([x.relu() for x in xs] for xs in (student, teacher))
    return [x.to(dtype).double() for x in student], [x.to(dtype).double() for x in teacher]
