"""Losses of rows of features, whatever the features are, against their definitions in fp64."""

from __future__ import annotations

import torch
from checking import by_definition
from hypothesis import assume, given
from hypothesis import strategies as st
from judging import MORE, Case, Draw, Family, Loss, check, leaves_float32, on_backends
from strategies import labels, pairs, reductions, sizes, temperatures
from torch import Tensor

import kdkernels
from kdkernels.ops.checks import compute_dtype

SUMS = st.sampled_from(["mean", "sum"])
widths = sizes.filter(bool)
COSINE_EPS = 1e-8


def features(draw: Draw, *, same_width: bool = False, views: int = 1, flat: bool = False) -> tuple[Tensor, Tensor]:
    """(B, D) and (B, D'), or (B, ...), B a multiple of ``views``."""
    batch = views * draw(st.sampled_from([0, 1, 2, 3, 5, 7, 13] if views == 1 else [0, 1, 2, 3, 5]))
    width = draw(widths)
    other = width if same_width else draw(widths)
    student, teacher = draw(pairs((batch, width), (batch, other)))
    if not flat and draw(st.booleans()):
        student, teacher = student.unflatten(1, (width, 1, 1)), teacher.unflatten(1, (1, other))
    return student, teacher


def over_lengths(student: Tensor, scale: float = 4.0, eps: float = COSINE_EPS) -> Tensor:
    """What is left of a gradient across a row is left of one of this size."""
    return scale / student.double().flatten(1).norm(dim=1).clamp(min=eps)


def uniform(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Where each network's cosines have its own precision, and not that of the wider of the two."""
    return student, teacher.to(student.dtype) if torch.float64 in (student.dtype, teacher.dtype) else teacher


def sp(draw: Draw) -> Case:
    student, teacher = features(draw)
    row_norm, reduction = draw(st.sampled_from(["l2", "l1"])), draw(SUMS)
    return Case(
        lambda s, t: kdkernels.sp_loss(s, t, row_norm=row_norm, reduction=reduction),
        [student],
        [teacher],
        overflow=leaves_float32(4, student, teacher),
        natural=over_lengths(student, eps=1e-6).norm(),
    )


def cosine(draw: Draw) -> Case:
    rows = features(draw, same_width=True, flat=True)[: draw(st.integers(1, 2))]
    return Case(
        kdkernels.cosine_similarity,
        rows,
        overflow=leaves_float32(2, *rows),
        natural=over_lengths(torch.cat(rows), 2 * len(rows[0]) ** 0.5).norm(),
        own=1.0,
    )


def gram(draw: Draw) -> Case:
    rows = features(draw, same_width=True, flat=True)[: draw(st.integers(1, 2))]
    centered, length = draw(st.booleans()), torch.cat(rows).double().nan_to_num(0, 0, 0).norm()
    return Case(
        lambda *rows: kdkernels.gram(*rows, centered=centered),
        rows,
        overflow=leaves_float32(2, *rows),
        natural=8 * len(rows[0]) * length if centered else 0.0,
        rest_of=8 * length**2 if centered else 0.0,
    )


def rkd(draw: Draw) -> Case:
    student, teacher = features(draw)
    weights = draw(st.sampled_from([(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)]))
    squared, reduction = draw(st.booleans()), draw(SUMS)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        options = {"distance_weight": weights[0], "angle_weight": weights[1], "squared": squared}
        return kdkernels.rkd_loss(s, t, reduction=reduction, **options)

    overflow, natural = leaves_float32(2, student, teacher), over_distances(student, compute_dtype(student, teacher))
    return Case(loss, [student], [teacher], overflow=overflow, natural=sum(weights) * natural, own=sum(weights))


def over_distances(student: Tensor, dtype: torch.dtype) -> float:
    """An angle's gradient is over the distance of two rows; whatever the dtype, distances are in fp64."""
    x = student.double().flatten(1)
    distances = (x[:, None] - x[None]).norm(dim=2)
    found = distances[distances > 0]
    nearest = max(found.min().item(), 1e-12) if found.numel() else 1.0
    return len(x) / nearest * torch.finfo(torch.float64).eps / torch.finfo(dtype).eps


def of_squares(loss: Loss, student: Tensor, teacher: Tensor) -> float:
    """The differences, of numbers of order 1, whose squares a loss adds up."""
    with by_definition():
        value = loss(student.double(), teacher.double()).nan_to_num(0, 0, 0)
    return len(student) * value.clamp(min=0).sqrt().sum().item()


def irg(draw: Draw) -> Case:
    student, teacher = features(draw)
    squared, reduction = draw(st.booleans()), draw(SUMS)
    loss = lambda s, t: kdkernels.irg_loss(s, t, squared=squared, reduction=reduction)  # noqa: E731
    return Case(
        loss,
        [student],
        [teacher],
        overflow=leaves_float32(2, student, teacher),
        natural=of_squares(loss, student, teacher),
        rest_of=of_squares(loss, student, teacher),
        own=len(student) ** 2,
    )


def pkt(draw: Draw) -> Case:
    student, teacher = features(draw)
    # opposite rows have k = 0 but for a cosine's rounding, which is as large as the eps beside it
    assume(min(student[0].numel(), teacher[0].numel()) > 1 if len(student) else True)
    reduction = draw(SUMS)
    return Case(
        lambda s, t: kdkernels.pkt_loss(s, t, reduction=reduction),
        [student],
        [teacher],
        overflow=leaves_float32(2, student, teacher),
        natural=over_lengths(student, eps=1e-7).norm(),
        rest_of=0.02 * (len(student) ** 2 if reduction == "sum" else 1),  # opposite rows: their P is made of roundings
        own=2 * len(student) ** 2,
    )


def cc(draw: Draw) -> Case:
    student, teacher = features(draw)
    reduction, normalize = draw(SUMS), draw(st.booleans())
    options = {"kernel": draw(st.sampled_from(["gaussian", "bilinear"])), "order": draw(st.integers(1, 5))}
    loss = lambda s, t: kdkernels.cc_loss(s, t, normalize=normalize, reduction=reduction, **options)  # noqa: E731
    return Case(
        loss,
        [student],
        [teacher],
        rest_of=of_squares(loss, student, teacher) if normalize else 0.0,
        overflow=leaves_float32(2 if normalize else 24, student, teacher),
        # not normalised, 1 - K of a short row has K's rounding
        natural=over_lengths(student, eps=1e-12).norm() if normalize else 2 * student.double().norm(),
        own=len(student) ** 2,
    )


def neighbours(draw: Draw) -> Case:
    student, teacher = features(draw, same_width=True, flat=True)
    return Case(
        kdkernels.neighbour_correlation_loss, [student], [teacher], overflow=leaves_float32(2, student, teacher)
    )


def correlation(draw: Draw) -> Case:
    views = draw(st.sampled_from([1, 2, 4]))
    student, teacher = uniform(*features(draw, views=views, flat=True))
    options = {"views": views, "temperature": draw(temperatures), "reduction": draw(reductions)}
    if student.dtype == torch.float16:  # which gives an all-zero row no gradient, as it could not hold it
        assume(bool((student.double().norm(dim=1) > COSINE_EPS).all()))
    with by_definition():
        kl = kdkernels.correlation_loss(student.double(), teacher.double(), **options).nan_to_num(0, 0, 0).sum()
    return Case(
        lambda s, t: kdkernels.correlation_loss(s, t, **options),
        [student],
        [teacher],
        overflow=leaves_float32(2, student, teacher),
        natural=over_lengths(student, 4 * len(student) / options["temperature"]).norm(),
        # a cosine's rounding is not of its angle, and rows of one direction have all their cosines near 1
        rest_of=(2 * len(student) * kl.clamp(min=0)).sqrt().item() / options["temperature"]
        + 1e-7 / options["temperature"] ** 2,
    )


def units(x: Tensor) -> Tensor:
    """Rows of length 1. A shorter one than the eps is divided by that, a constant."""
    return x / x.norm(dim=1, keepdim=True).clamp(min=COSINE_EPS)


def reduced(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.sum() / (max(len(rows), 1) if reduction == "mean" else 1)


def aligned(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    return reduced(2 - 2 * (units(student) * units(teacher.detach())).sum(1), reduction)


def alignment(draw: Draw) -> Case:
    student, teacher = features(draw, same_width=True, flat=True)
    reduction = draw(reductions)
    return Case(
        lambda s, t: kdkernels.alignment_loss(s, t, reduction=reduction),
        [student],
        [teacher],
        oracle=lambda s, t: aligned(s, t, reduction),
        by_row=True,
        overflow=leaves_float32(2, student, teacher),
        natural=over_lengths(student),
    )


def contrasted(student: Tensor, teacher: Tensor, target: Tensor, tau: float, reduction: str) -> Tensor:
    """The mean over the positives of -log softmax, with 1e-7 beside the sum of e^(l - max)."""
    rows, y = units(torch.cat([student, teacher])), target.repeat(2)
    if len(rows) == 0:
        return reduced(rows.sum(1), reduction)
    logits = rows @ rows.T / tau
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    most = logits.detach().amax(1, keepdim=True)
    sums = most + ((logits - most).exp().masked_fill(own, 0).sum(1, keepdim=True) + 1e-7).log()
    positive = (y[:, None] == y) & ~own
    return reduced(((sums - logits) * positive).sum(1) / positive.sum(1), reduction)


def supervised(draw: Draw) -> Case:
    student, teacher = features(draw, same_width=True, flat=True)
    target = draw(labels(len(student), 3, ignore=None))
    tau, reduction = draw(st.sampled_from([0.07, 0.5, 4.0])), draw(reductions)
    return Case(
        lambda s, t: kdkernels.supervised_contrastive_loss(s, t, target, temperature=tau, reduction=reduction),
        [student, teacher],
        oracle=lambda s, t: contrasted(s, t, target, tau, reduction),
        overflow=leaves_float32(2, student, teacher),
        natural=over_lengths(torch.cat([student, teacher]), 16 * max(len(student), 1) / tau).norm(),
        rest_of=(2 / tau + 1) * max(2 * len(student), 1),
    )


def mlkd(draw: Draw) -> Case:
    views = draw(st.sampled_from([1, 2, 4]))
    student, teacher = uniform(*features(draw, same_width=True, views=views, flat=True))
    if student.dtype == torch.float16:
        assume(bool((student.double().norm(dim=1) > COSINE_EPS).all()))
    target = draw(labels(len(student), 3, ignore=None))
    weights = draw(st.sampled_from([(50.0, 1.0, 20.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0)]))
    reduction = draw(SUMS)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        alpha, beta, delta = weights
        options = {"correlation_weight": alpha, "supervised_weight": beta, "alignment_weight": delta}
        return kdkernels.mlkd_loss(s, t, target, views=views, reduction=reduction, **options)

    def oracle(s: Tensor, t: Tensor) -> Tensor:
        t, terms = t.detach(), torch.zeros((), dtype=compute_dtype(s, t), device=s.device)
        if weights[0]:
            terms = terms + weights[0] * kdkernels.correlation_loss(s, t, views=views, reduction=reduction)
        if weights[1]:
            terms = terms + weights[1] * contrasted(s, t, target, 0.07, reduction)
        return terms + weights[2] * aligned(s, t, reduction)

    overflow = leaves_float32(2, student, teacher)
    natural = over_lengths(student, 1000.0 * max(len(student), 1)).norm()
    # the supervised term is the logarithm of a probability that may be all but 1
    return Case(loss, [student], [teacher], oracle=oracle, overflow=overflow, natural=natural, rest_of=1.0)


FAMILIES = {
    "sp": Family(["gram"], sp),
    "cosine": Family(["gram"], cosine),
    "gram": Family(["gram"], gram),
    "rkd": Family(["relation"], rkd),
    "irg": Family(["relation"], irg),
    "pkt": Family(["relation"], pkt),
    "cc": Family(["relation"], cc),
    "neighbours": Family(["neighbour_correlation"], neighbours),
    "correlation": Family(["gram", "softmax_kl"], correlation),
    "alignment": Family([], alignment),
    "supervised": Family(["gram"], supervised),
    "mlkd": Family(["gram", "softmax_kl"], mlkd),
}


@on_backends(FAMILIES)
@MORE
@given(data=st.data())
def test_it_is_its_definition(family: Family, backend: str, data: st.DataObject) -> None:
    check(data.draw, family, backend)
