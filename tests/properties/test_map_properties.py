"""Losses of feature maps, whatever the maps are, against their definitions in fp64."""

from __future__ import annotations

import torch
from checking import by_definition
from hypothesis import assume, given
from hypothesis import strategies as st
from judging import MORE, Case, Draw, Family, Loss, check, leaves_float32, on_backends
from strategies import SLOW, pairs, reductions
from torch import Tensor

import kdkernels

CHANNELS = st.sampled_from([1, 2, 3, 7, 17] if SLOW else [1, 2, 3, 7, 17, 67])
SIDES = st.sampled_from([1, 2, 3, 5] if SLOW else [1, 2, 3, 5, 7, 11])
POWERS = st.sampled_from([2.0, 2.0, 1.0, 3.0, 1.5])


def maps(draw: Draw, *, same_channels: bool = False, least: int = 1, most: int = 30) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) and (B, C', H, W)."""
    batch, channels = draw(st.sampled_from([0, 1, 2, 3, 5])), draw(CHANNELS)
    sides = [max(draw(SIDES), least) for _ in range(2)]
    other = channels if same_channels else draw(CHANNELS)
    return draw(pairs((batch, channels, *sides), (batch, other, *sides), most=most))


def over_lengths(student: Tensor, scale: float = 4.0, eps: float = 1e-12) -> Tensor:
    """Of each sample: see judging.py."""
    return scale / student.double().flatten(1).norm(dim=1).clamp(min=eps)


def power_lengths(student: Tensor, power: float) -> Tensor:
    """What is left of the gradient of |A|^p over its norm."""
    x = student.double().abs()
    norm = x.pow(power).mean(1).flatten(1).norm(dim=1).clamp(min=1e-12)
    return 4 * power * x.pow(power - 1).flatten(1).norm(dim=1) / norm / student.shape[1]


def energy(draw: Draw) -> Case:
    x, _ = maps(draw)
    power, normalize = draw(POWERS), draw(st.booleans())
    return Case(
        lambda x: kdkernels.energy(x, power, normalize=normalize),
        [x],
        by_row=True,
        overflow=leaves_float32(2 * power, x),
        natural=power_lengths(x, power) * x[0, 0].numel() ** 0.5 if normalize and len(x) else 0.0,
    )


def at(draw: Draw) -> Case:
    power, reduction = draw(POWERS), draw(reductions)
    return _of_energies(draw, power, lambda s, t: kdkernels.at_loss(s, t, p=power, reduction=reduction))


def ft(draw: Draw) -> Case:
    power, reduction, p2 = draw(POWERS), draw(reductions), draw(st.sampled_from([1.0, 2.0]))
    loss = lambda s, t: kdkernels.ft_loss(s, t, p1=power, p2=p2, reduction=reduction)  # noqa: E731
    case = _of_energies(draw, power, loss)
    if p2 == 1 and case.inputs[0].numel():  # a small difference has no sign that one could count on
        a, b = (factors(x, power) for x in (case.inputs[0], case.constants[0]))
        assume(bool(((a - b).abs() > 1e-5 * torch.maximum(a, b)).all()) and bool((torch.maximum(a, b) > 1e-6).all()))
    return case


def factors(x: Tensor, power: float) -> Tensor:
    f = x.double().abs().pow(power).mean(1).flatten(1)
    return f / f.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _of_energies(draw: Draw, power: float, loss: Loss) -> Case:
    student, teacher = maps(draw)
    return Case(
        loss,
        [student],
        [teacher],
        by_row=True,
        overflow=leaves_float32(2 * power, student, teacher),
        natural=power_lengths(student, power),
        own=4 * len(student),
    )


def of_one_pixel(x: Tensor) -> bool:
    """A quadrant is one pixel with all the energy: of its 1 - q only the sign counts, and rounding decides it."""
    if x.numel() == 0 or max(x.shape[2:]) > 3:
        return False
    r = x.double().square().sum(1).flatten(1)
    q = r / r.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return bool((q > 1 - 1e-5).any())


def amd(draw: Draw) -> Case:
    local = draw(st.sampled_from([0.0, 0.2, 1.0]))
    student, teacher = maps(draw, least=2 if local else 1)
    options = {"margin": draw(st.sampled_from([1.35, 1.0, 2.0])), "sharpness": draw(st.sampled_from([64.0, 1.0]))}
    options |= {"local_weight": local, "reduction": draw(reductions)}
    if local or student.shape[2:].numel() == 1:
        assume(not any(map(of_one_pixel, (student, teacher))))
    if options["margin"] == 1:  # u is q, and 0 on a dead map: what of it is rounding is made a unit vector
        assume(all(x.numel() == 0 or (x.float().abs().amax((1, 2, 3)) > 1e-3).all() for x in (student, teacher)))
    if draw(st.booleans()):
        options["layer_weights"] = "area"
    with by_definition():
        values = kdkernels.amd_loss(student.double(), teacher.double(), **options).nan_to_num(0, 0, 0)
    return Case(
        lambda s, t: kdkernels.amd_loss(s, t, **options),
        [student],
        [teacher],
        by_row=True,
        overflow=leaves_float32(4, student, teacher),
        natural=100 * power_lengths(student, 2.0) * student[:1, 0].numel() ** (2 if "layer_weights" in options else 0),
        rest_of=values.clamp(min=0).sqrt().sum().item(),  # squares of differences of unit vectors, each rounded
        own=4 * len(student) * (student.shape[2:].numel() ** 2 if "layer_weights" in options else 1),
    )


def nst(draw: Draw) -> Case:
    student, teacher = maps(draw)
    reduction = draw(reductions)
    channels = student.double().flatten(2).norm(dim=2).clamp(min=1e-12)
    return Case(
        lambda s, t: kdkernels.nst_loss(s, t, reduction=reduction),
        [student],
        [teacher],
        by_row=True,
        overflow=leaves_float32(2, student, teacher),
        natural=(8 / student.shape[1] / channels).norm(dim=1),
        rest_of=1.0,  # both networks' products
        own=4 * len(student),
    )


def ickd(draw: Draw) -> Case:
    student, teacher = maps(draw, same_channels=True)
    reduction = draw(reductions)
    x = student.double().flatten(2)
    rows = (x @ x.mT).norm(dim=2).clamp(min=1e-12)
    return Case(
        lambda s, t: kdkernels.ickd_loss(s, t, reduction=reduction),
        [student],
        [teacher],
        by_row=True,
        overflow=leaves_float32(4, student, teacher),
        natural=(8 / rows).norm(dim=1) * x.flatten(1).norm(dim=1),
        own=4 * len(student),
    )


def fsp(draw: Draw) -> Case:
    first, second = maps(draw, same_channels=True), maps(draw, same_channels=True)
    batch = min(len(first[0]), len(second[0]))
    layers = [x[:batch] for x in (first[0], second[0], first[1], second[1])]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in layers) else None
    layers = [x if dtype is None else x.to(dtype) for x in layers]
    reduction = draw(reductions)
    return Case(
        lambda a, b, c, d: kdkernels.fsp_loss([a, b], [c, d], reduction=reduction),
        layers[:2],
        layers[2:],
        by_row=True,
        overflow=leaves_float32(5, *layers),
    )


def channel_gram(draw: Draw) -> Case:
    x, y = maps(draw)
    return Case(kdkernels.channel_gram, [x, y], by_row=True, overflow=leaves_float32(2, x, y))


FAMILIES = {
    "energy": Family(["energy"], energy),
    "at": Family(["energy"], at),
    "ft": Family(["energy"], ft),
    "amd": Family(["angular_margin", "energy"], amd),
    "nst": Family(["channel_gram"], nst),
    "ickd": Family(["channel_gram"], ickd),
    "fsp": Family(["channel_gram"], fsp),
    "channel_gram": Family([], channel_gram),
}


@on_backends(FAMILIES)
@MORE
@given(data=st.data())
def test_it_is_its_definition(family: Family, backend: str, data: st.DataObject) -> None:
    check(data.draw, family, backend)
