"""Losses of logits, whatever the logits are, against their definitions in fp64."""

from __future__ import annotations

from typing import Any

import torch
from checking import by_definition
from hypothesis import assume, given
from hypothesis import strategies as st
from judging import MORE, Case, Draw, Family, check, leaves_float32, on_backends
from strategies import fractions, labels, pairs, reductions, sizes, small, temperatures
from torch import Tensor

from kdkernels import cwd_loss, dist_loss, kd_loss, mlld_loss, nkd_loss, stkd_loss

WEIGHTS = st.sampled_from([0.0, 0.1, 1.0, 8.0])
classes = sizes.filter(bool)


def shape_of(draw: Draw) -> tuple[int, int]:
    """(N, C), one of them small."""
    return (draw(small), draw(classes)) if draw(st.booleans()) else (draw(sizes), draw(small.filter(bool)))


def kd(draw: Draw) -> Case:
    student, teacher = draw(pairs(shape_of(draw)))
    divergence = draw(st.sampled_from(["forward", "reverse", "jsd", "skew", "skew_reverse"]))
    options: dict[str, Any] = {"divergence": divergence, "temperature": draw(temperatures)}
    if divergence not in ("forward", "reverse"):
        options["beta"] = draw(st.sampled_from([0.1, 0.5, 0.9, 1e-3]))
    options |= {"standardize": draw(st.integers(0, 3)) == 0, "scale_by_t2": draw(st.booleans())}
    options["reduction"] = draw(reductions)
    with by_definition():
        value = kd_loss(student.double(), teacher.double(), **options | {"reduction": "sum"}).nan_to_num(0, 0, 0)
    return Case(
        lambda s, t: kd_loss(s, t, **options),
        [student],
        [teacher],
        by_row=True,
        overflow=leaves_float32(2 if options["standardize"] else 1, student, teacher),
        # q (h - mean of h), of logarithms h that may all be near the divergence itself
        natural=across(student, options)
        + confident(student, options)
        + (divergence != "forward") * max(options["temperature"], 1) * value,
        rest_of=options["standardize"] * student.shape[1] * first_order(value, options["temperature"]),
        own=max(options["temperature"], 1) ** 2 * max(len(student), 1),
    )


def first_order(value: Tensor, temperature: float) -> float:
    """The terms of T^2 KL = T^2 sum p d that are of d's first order, and cancel."""
    return max(temperature, 1) * (2 * value.clamp(min=0)).sqrt().item()


def cancelling(options: dict[str, Any]) -> float:
    """What q_s - q_t is left over from, made as a difference of two exponentials."""
    return 2 * float(options.get("kd_weight", 1)) * max(options["temperature"], 1)


def across(student: Tensor, options: dict[str, Any]) -> Tensor | float:
    """What standardised logits' gradient is left over from: that of z', over the standard deviation."""
    if not options["standardize"] or student.shape[1] < 2:
        return 0.0
    return 2 * max(options["temperature"], 1) / (student.double().std(1) + 1e-7)


def confident(student: Tensor, options: dict[str, Any]) -> Tensor:
    """What the gradient of a row is left over from whose classes all but one have next to no probability: 1 - q."""
    weight = options.get("kd_weight", 1) * max(1, *options.get("decouple", (1,))) * max(options["temperature"], 1)
    z = student.double() / options["temperature"]
    slopes = 1.0  # beside the probabilities, which for most divergences have logarithms as factors
    if options.get("divergence", "forward") != "forward" and z.shape[1]:
        slopes = 1 + (z.amax(1) - z.amin(1)).nan_to_num(0, 0, 0)
    return weight * slopes * (z.softmax(1).amax(1) > 0.9)


def of_labels(options: dict[str, Any]) -> float:
    """p sum(y) - y, which is 0 where there is one class."""
    return 2 * float(options["ce_weight"])


def size_of(options: dict[str, Any]) -> float:
    """Of the terms: rows are of order 1 before they are weighted."""
    decoupled = sum(options.get("decouple", (1.0,)))
    return float(options["ce_weight"] + options["kd_weight"] * decoupled * max(options["temperature"], 1) ** 2)


def labelled(draw: Draw) -> tuple[Tensor, Tensor, dict[str, Any]]:
    student, teacher = draw(pairs(shape_of(draw)))
    options = {"ce_weight": draw(WEIGHTS), "kd_weight": draw(WEIGHTS), "temperature": draw(temperatures)}
    if not options["ce_weight"] + options["kd_weight"]:
        options["ce_weight"] = 1.0
    if not options["kd_weight"]:  # then its terms are not computed, where the formula has 0 times NaN
        student, teacher = (x.nan_to_num(0, 0, 0) for x in (student, teacher))
    return student, teacher, options | {"reduction": draw(reductions)}


def stkd(draw: Draw) -> Case:
    student, teacher, options = labelled(draw)
    target = draw(labels(*student.shape))
    options |= {"label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])), "standardize": draw(st.booleans())}
    return Case(
        lambda s, t: stkd_loss(s, t, target, **options),
        [student],
        [teacher],
        by_row=True,
        overflow=leaves_float32(2, student, teacher),
        natural=of_labels(options) + options["kd_weight"] * across(student, options) + confident(student, options),
        rest_of=options["ce_weight"],  # the logarithm of a probability that may be all but 1
        own=size_of(options),
    )


def mixed(draw: Draw) -> Case:
    """Two labels a row, decoupled or not."""
    student, teacher, options = labelled(draw)
    a, b = draw(labels(*student.shape)), draw(labels(*student.shape))
    lam = draw(fractions((len(student),) if draw(st.booleans()) else ()))
    if draw(st.booleans()):
        options["decouple"] = draw(st.sampled_from([(1.0, 8.0), (0.0, 1.0), (1.0, 0.0)]))
        if 0.0 in options["decouple"]:
            student, teacher = (x.nan_to_num(0, 0, 0) for x in (student, teacher))

    def loss(s: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        return stkd_loss(s, t, a, b, lam.clamp(0, 1), **options)

    overflow = leaves_float32(1, student, teacher)
    natural, own = of_labels(options) + confident(student, options), size_of(options)
    rest = options["ce_weight"]  # as above
    return Case(loss, [student], [teacher, lam], None, True, overflow, natural, rest, own)


def dense(draw: Draw) -> Case:
    student, teacher, options = labelled(draw)
    target = draw(fractions(student.shape))
    overflow = leaves_float32(1, student, teacher)
    return Case(
        lambda s, t, y: stkd_loss(s, t, y, **options),
        [student],
        [teacher, target],
        by_row=True,
        overflow=overflow,
        natural=of_labels(options) * max(student.shape[1], 1) + confident(student, options),
        rest_of=options["ce_weight"],  # the logarithm of a probability that may be all but 1
        own=size_of(options),
    )


def nkd(draw: Draw) -> Case:
    student, teacher = draw(pairs(shape_of(draw)))
    target = draw(labels(*student.shape))
    options = {"temperature": draw(temperatures), "gamma": draw(WEIGHTS), "reduction": draw(reductions)}
    return Case(
        lambda s, t: nkd_loss(s, t, target, **options),
        [student],
        [teacher],
        by_row=True,
        overflow=leaves_float32(1, student, teacher),
        natural=options["gamma"] * cancelling(options),
        rest_of=options["gamma"] * options["temperature"] ** 2,  # the logarithm of a sum that is all but 1
        own=1 + options["gamma"] * options["temperature"] ** 2,
    )


def dist(draw: Draw) -> Case:
    student, teacher = draw(pairs(shape_of(draw)))
    options = {"temperature": draw(temperatures), "beta": draw(WEIGHTS), "gamma": draw(WEIGHTS)}
    return Case(
        lambda s, t: dist_loss(s, t, **options),
        [student],
        [teacher],
        overflow=leaves_float32(1, student, teacher),
        natural=pearson_size(student, **options),
        own=max(options["temperature"], 1) ** 2 * (options["beta"] + options["gamma"]),
    )


def pearson_size(student: Tensor, temperature: float, beta: float, gamma: float) -> float:
    """What a correlation's gradient is left over from: the probabilities over their spread."""
    if not student.numel():
        return 0.0
    q, spreads = (student.double() / temperature).softmax(1), []
    for weight, x in ((beta, q), (gamma, q.t())):
        spread = (x - x.mean(1, keepdim=True)).norm(dim=1)
        spreads.append(weight * (x.norm(dim=1) / spread.clamp(min=1e-9)).nan_to_num(0).max().item())
    return 2 * temperature * sum(spreads)


def same_shares(teacher: Tensor, quantile: float) -> bool:
    """Whether the rows and classes that MLLD takes for unsure are the same in float32, which has more equal ones."""
    shares = []
    for x in (teacher.float(), teacher.double()):
        p = x.softmax(1)
        of_both = [c for c in (p.amax(1), p.sum(0)) if c.numel() and c.isfinite().all()] if p.numel() else []
        shares.append([(c <= c.quantile(quantile)).double().mean().item() for c in of_both])
    return teacher.dtype == torch.float64 or shares[0] == shares[1]


def mlld(draw: Draw) -> Case:
    student, teacher = draw(pairs(shape_of(draw)))
    if student.shape[1] == 1:  # whose gradient is 0
        student, teacher = (x.nan_to_num(0, 0, 0) for x in (student, teacher))
    levels = draw(st.lists(temperatures, min_size=1, max_size=3, unique=True))
    options = {"temperatures": levels, "strong_temperatures": levels[:1], "quantile": draw(st.sampled_from([0.5, 1]))}
    options |= {"batch_weight": draw(WEIGHTS), "class_weight": draw(WEIGHTS)}
    assume(same_shares(teacher, options["quantile"]))
    with by_definition():
        value = mlld_loss(student.double(), teacher.double(), **options).nan_to_num(0, 0, 0)
    return Case(
        lambda s, t: mlld_loss(s, t, **options),
        [student],
        [teacher],
        overflow=leaves_float32(1, student, teacher),
        natural=sum(cancelling({"temperature": level}) for level in levels),
        rest_of=first_order(value, max(levels)),
        own=sum(max(level, 1) ** 2 + 16 for level in levels) * 8,
    )


def cwd(draw: Draw) -> Case:
    shape = draw(small), draw(small), *(draw(small.filter(bool)) for _ in range(2))
    student, teacher = draw(pairs(shape))
    options = {"temperature": draw(temperatures), "reduction": draw(reductions)}
    return Case(
        lambda s, t: cwd_loss(s, t, **options),
        [student],
        [teacher],
        by_row=True,
        overflow=leaves_float32(1, student, teacher),
        natural=confident(student.flatten(2).flatten(0, 1), options).view(student.shape[:2]).norm(dim=1),
        own=options["temperature"] ** 2,
    )


FAMILIES = {
    "kd": Family(["softmax_kl"], kd),
    "stkd": Family(["softmax_kl"], stkd),
    "mixed": Family(["softmax_kl"], mixed),
    "dense": Family(["softmax_kl"], dense),
    "nkd": Family(["nkd"], nkd),
    "dist": Family(["softmax_pearson"], dist),
    "mlld": Family(["multi_level"], mlld),
    "cwd": Family(["softmax_kl"], cwd),
}


@on_backends(FAMILIES)
@MORE
@given(data=st.data())
def test_it_is_its_definition(family: Family, backend: str, data: st.DataObject) -> None:
    check(data.draw, family, backend)
