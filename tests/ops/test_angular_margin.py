"""angular_margin on every backend: numbers against the definition in fp64, the contract, the edges."""

from __future__ import annotations

import math

import pytest
import torch
from checking import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    by_definition,
    check_compiled,
    check_contract,
    check_op,
    gradients,
    opcheck,
)
from torch import Tensor

from kdkernels.ops.angular_margin import ActivationPairs
from kdkernels.ops.angular_margin import angular_margin as op

SHAPES = [
    ((1, 2, 4, 2), 3),  # a quadrant of one pixel is 1 or -1, whose gradient is the rounding of nothing
    ((2, 3, 4, 4), 5),
    ((3, 7, 7, 7), 2),
    ((2, 5, 8, 6), 9),
    ((2, 16, 13, 17), 33),
    ((1, 3, 32, 32), 4),
]
ONE_LAYER = {"margin": 1.35, "sharpness": 64.0, "layer_weights": [1.0]}
pytestmark = pytest.mark.usefixtures("backend")


def angular_margin(student: Tensor | list[Tensor], teacher: Tensor | list[Tensor], **options: object) -> Tensor:
    students, teachers = ([x] if isinstance(x, Tensor) else x for x in (student, teacher))
    return op(ActivationPairs(students, teachers, **options))


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).relu().to(DEVICE, dtype)


def pair(shape: tuple[int, ...], channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    b, _, h, w = shape
    return activations(*shape, dtype=dtype), activations(b, channels, h, w, dtype=dtype)


@pytest.mark.parametrize("local_weight", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channels"), SHAPES, ids=str)
def test_meets_the_definition(shape: tuple[int, ...], channels: int, dtype: torch.dtype, local_weight: float) -> None:
    student, teacher = pair(shape, channels, dtype)
    check_op(
        lambda s, t: angular_margin(s, t, local_weight=local_weight, **ONE_LAYER),
        [student],
        constants=[teacher],
        upstream=1e4,
    )


@pytest.mark.parametrize("size", [(2, 2), (3, 2), (3, 3)])
def test_quadrants_of_one_bright_pixel(size: tuple[int, int]) -> None:
    """Their G is so small that its norm is clamped: no unit vectors, and another projection."""
    student, teacher = activations(8, 4, *size) + 0.3, activations(8, 5, *size) + 0.3
    student[::2, :, 0, 0] += 9
    teacher[::3, :, 0, 0] += 9
    options = {"local_weight": 0.2, **ONE_LAYER}
    _, (gradient,) = check_op(
        lambda s, t: angular_margin(s, t, **options), [student], constants=[teacher], upstream=1.0
    )
    with by_definition():
        exact = student.double()
        direction = torch.randn_like(exact)
        moved = [angular_margin(exact + d * direction, teacher.double(), **options) for d in (1e-6, -1e-6)]
    slope = ((moved[0] - moved[1]) / 2e-6).item()
    assert (gradient.double() * direction).sum().item() == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("layer_reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_layers(dtype: torch.dtype, reduction: str, layer_reduction: str) -> None:
    rows = 2 if INTERPRETED else 3
    pairs = [pair((rows, *shape), 4, dtype) for shape in [(4, 16, 16), (8, 8, 8), (5, 5, 4)]]
    students, teachers = zip(*pairs, strict=True)
    check_op(
        lambda *x: angular_margin(
            list(x[:3]),
            list(x[3:]),
            margin=1.2,
            sharpness=32.0,
            local_weight=0.3,
            layer_weights=[3.0, 0.0, 0.5],
            area_weights=reduction == "sum",
            reduction=reduction,
            layer_reduction=layer_reduction,
        ),
        students,
        constants=teachers,
        upstream=1e3,
    )


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_strides(layout: str) -> None:
    views = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(2, 3),
        "sliced": lambda x: x[:, ::2, 1:],
        "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    }
    student, teacher = pair((3, 6, 5, 5), 4)
    check_op(
        lambda s, t: angular_margin(views[layout](s), views[layout](t), local_weight=0.2, **ONE_LAYER),
        [student],
        constants=[teacher],
        upstream=1e3,
    )
    leaf = views[layout](student).detach().requires_grad_()
    gradient = gradients(angular_margin(leaf, views[layout](teacher), **ONE_LAYER), [leaf])[0]
    if layout == "channels_last":
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("local_weight", [0.0, 0.2])
@pytest.mark.parametrize("size", [(48, 47), (65, 66)])
def test_maps_of_many_pixels(size: tuple[int, int], local_weight: float) -> None:
    """More than a block of a GPU has room for, at first in fp64 alone."""
    for dtype in (torch.float32, torch.float64):
        student, teacher = pair((1, 3, *size), 2, dtype)
        check_op(
            lambda s, t: angular_margin(s, t, local_weight=local_weight, **ONE_LAYER),
            [student],
            constants=[teacher],
            upstream=1e4,
        )


def test_fp32_gradient_where_the_published_formula_loses_a_tenth() -> None:
    student, teacher = pair((64, 64, 16, 16), 64)
    check_op(lambda s, t: angular_margin(s, t, **ONE_LAYER), [student[:4]], constants=[teacher[:4]])


def test_mixed_dtypes_of_student_and_teacher() -> None:
    student, teacher = pair((2, 3, 6, 6), 5)
    check_op(lambda s, t: angular_margin(s, t, **ONE_LAYER), [student.half()], constants=[teacher], upstream=1e4)


def test_contract() -> None:
    student, teacher = pair((3, 4, 5, 5), 6)
    weights = {"layer_weights": [1.0, 2.0], "local_weight": 0.2, "margin": 1.35, "sharpness": 64.0}
    check_contract(lambda s: angular_margin([s, s * s], [teacher, teacher], **weights), student)


def test_compiled() -> None:
    student, teacher = pair((3, 4, 5, 5), 6)
    other = student.square()
    weights = {"layer_weights": [1.0, 2.0], "local_weight": 0.2, "margin": 1.35, "sharpness": 64.0}
    check_compiled(lambda s: angular_margin([s, other], [teacher, teacher], **weights), student)


def test_opcheck() -> None:
    student, teacher = pair((2, 3, 4, 4), 5)
    reductions = (("mean", "sum"), ("none", "mean"), ("sum", "none"), ("none", "none"))
    for reduction, layer_reduction in reductions[-1:] if INTERPRETED else reductions:
        options = ([teacher, teacher], [1.0, 2.0], True, reduction, layer_reduction, 1.35, 64.0, 0.2)
        opcheck(torch.ops.kdkernels.angular_margin.default, ([student, teacher], *options, True))
        leaf = student.clone().requires_grad_()
        opcheck(torch.ops.kdkernels.angular_margin_traced.default, ([leaf, student], *options, True))


def test_empty_batch_is_zero() -> None:
    student = torch.zeros(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    loss = angular_margin(student, torch.zeros(0, 5, 4, 4, device=DEVICE), **ONE_LAYER)
    assert loss.item() == 0
    assert gradients(loss, [student])[0].shape == (0, 3, 4, 4)


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_maps_without_pixels_are_zero(size: tuple[int, int]) -> None:
    student = torch.zeros(2, 3, *size, device=DEVICE, requires_grad=True)
    loss = angular_margin(student, torch.zeros(2, 5, *size, device=DEVICE), **ONE_LAYER | {"local_weight": 0.0})
    assert loss.item() == 0
    assert gradients(loss, [student])[0].shape == (2, 3, *size)


def test_a_single_pixel_is_zero() -> None:
    # q is 1 up to the 1e-6: only G, which is -softplus(-64) there, is not constant
    student, teacher = (activations(3, c, 1, 1).add(0.1).requires_grad_() for c in (1, 2))
    loss = angular_margin(student, teacher.detach(), **ONE_LAYER)
    assert loss.item() < 1e-30
    assert (gradients(loss, [student])[0].abs() < 1e-25).all()


@pytest.mark.parametrize("local_weight", [0.0, 0.2])
@pytest.mark.parametrize("margin", [1.35, 1.0])  # with 1, u is 0 on a dead map, of which no rounding may be left
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dead_maps(dtype: torch.dtype, margin: float, local_weight: float) -> None:
    student, teacher = pair((6, 3, 6, 6), 5, dtype)
    student[1] = 0
    teacher[2] = 0
    student[3] *= 1e-5  # near-dead: the gradient grows with 1 / |A| until the 1e-6 takes over
    student[4, :, :3, 3:] = 0
    teacher[5, :, 3:] = 0
    loss, (gradient,) = check_op(
        lambda s, t: angular_margin(s, t, local_weight=local_weight, **(ONE_LAYER | {"margin": margin})),
        [student],
        constants=[teacher],
    )
    assert loss.isfinite()
    assert (gradient[1] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1e4, 1e8])
def test_small_and_large_activations(scale: float) -> None:
    student, teacher = (x * scale for x in pair((2, 3, 6, 6), 4))
    check_op(lambda s, t: angular_margin(s, t, **ONE_LAYER), [student], constants=[teacher], upstream=1e4)


@pytest.mark.parametrize("pixels", [1, 3])
def test_energies_whose_inverse_overflows(pixels: int) -> None:
    student, teacher = activations(2, 1, 1, pixels) + 0.1, activations(2, 1, 1, pixels) + 0.1
    check_op(lambda s, t: angular_margin(s, t, **ONE_LAYER), [1e-20 * student], constants=[teacher])


def test_energies_beyond_half_precision() -> None:
    student, teacher = pair((2, 8, 6, 6), 4, torch.float16)
    check_op(lambda s, t: angular_margin(s, t, **ONE_LAYER), [student * 1e4], constants=[teacher * 1e4], upstream=1e8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_inf_come_out(which: int, bad: float) -> None:
    both = list(pair((3, 2, 4, 4), 3))
    both[which][1, 1, 2, 3] = bad
    student = both[0].requires_grad_()
    loss = angular_margin(student, both[1], **ONE_LAYER)
    assert loss.isnan()
    gradient = gradients(loss, [student])[0]
    assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(7, 1, 1, 1), (7, 16, 1, 1), (7, 3, 2, 2), (7, 3, 3, 3)])
def test_one_pixel_with_all_the_energy_moves_nothing(shape: tuple[int, ...]) -> None:
    """Both maps are the same unit vector; 1 - q, rounded, made -1, 0 or 1 of it, and of the gradient anything."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2 if INTERPRETED else 8):
        student, teacher = torch.zeros(shape), torch.zeros(shape)
        for x in (student, teacher):
            x[:, :, 0, 0] = 0.1 + 5 * torch.rand(shape[:2], generator=generator)
        student = student.to(DEVICE).requires_grad_()
        loss = angular_margin(
            student,
            teacher.to(DEVICE),
            margin=1.35,
            sharpness=64.0,
            layer_weights=[1.0],
            local_weight=0.2 * (shape[2] > 1),
        )
        assert abs(loss.item()) < 1e-9
        assert gradients(loss, [student])[0].abs().max() < 1e-8
