"""energy and attention on every backend: numbers against the definition in fp64, the contract, the edges."""

from __future__ import annotations

import math
import os

import pytest
import torch
from checking import DEVICE, DTYPES, check_compiled, check_contract, check_op, gradients, opcheck
from torch import Tensor

from kdkernels.ops.energy import Activation, AttentionPairs
from kdkernels.ops.energy import attention as op
from kdkernels.ops.energy import energy as energy_op

SHAPES = [((1, 1, 4, 2), 3), ((3, 7, 7, 7), 2), ((2, 16, 13, 17), 33), ((1, 3, 32, 32), 4)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "sliced": lambda x: x[:, ::2, 1:],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
}
pytestmark = pytest.mark.usefixtures("backend")


def energy(x: Tensor, power: float = 2.0, normalize: bool = False) -> Tensor:
    return energy_op(Activation(x, power, normalize))


def attention(student: Tensor | list[Tensor], teacher: Tensor | list[Tensor], **options: object) -> Tensor:
    students, teachers = ([x] if isinstance(x, Tensor) else x for x in (student, teacher))
    options.setdefault("layer_weights", [1.0] * len(students))
    return op(AttentionPairs(students, teachers, **options))


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def pair(shape: tuple[int, ...], channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    b, _, h, w = shape
    return activations(*shape, dtype=dtype), activations(b, channels, h, w, dtype=dtype)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES], ids=str)
def test_energy_meets_the_definition(shape: tuple[int, ...], dtype: torch.dtype, normalize: bool) -> None:
    check_op(lambda x: energy(x, normalize=normalize), [activations(*shape, dtype=dtype)], upstream=1e3)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channels"), SHAPES, ids=str)
def test_attention_meets_the_definition(
    shape: tuple[int, ...], channels: int, dtype: torch.dtype, absolute: bool
) -> None:
    student, teacher = pair(shape, channels, dtype)
    check_op(lambda s, t: attention(s, t, absolute=absolute), [student], constants=[teacher], upstream=1e5)


@pytest.mark.parametrize("power", [1.0, 1.5, 4.0])
def test_other_powers(power: float) -> None:
    student, teacher = pair((2, 3, 5, 4), 6)
    student[0, 1] = 0  # where |x|^(p - 1) has no slope
    check_op(lambda x: energy(x, power, True), [student])
    for absolute in (False, True):
        check_op(
            lambda s, t, a=absolute: attention(s, t, power=power, absolute=a),
            [student],
            constants=[teacher],
            upstream=1e3,
        )
    half = student.half()[:, ::2].requires_grad_()
    gradient = gradients(attention(half, teacher, power=power), [half], 1e3)[0]
    assert gradient.dtype == torch.float16
    assert gradient.isfinite().all()


@pytest.mark.parametrize("layer_reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_several_layers(reduction: str, layer_reduction: str) -> None:
    pairs = [pair(shape, 4) for shape in [(3, 4, 16, 16), (3, 8, 8, 8), (3, 5, 5, 4)]]
    students, teachers = zip(*pairs, strict=True)
    weights = [3.0, 0.0, 0.5]
    check_op(
        lambda *x: attention(
            list(x[:3]), list(x[3:]), layer_weights=weights, reduction=reduction, layer_reduction=layer_reduction
        ),
        students,
        constants=teachers,
        upstream=1e3,
    )


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_strides(layout: str) -> None:
    view = LAYOUTS[layout]
    student, teacher = pair((3, 6, 5, 5), 4)
    check_op(lambda s, t: attention(view(s), view(t)), [student], constants=[teacher], upstream=1e3)
    check_op(lambda x: energy(view(x), normalize=True), [student])
    leaf = view(student).detach().requires_grad_()
    for loss in (attention(leaf, view(teacher)), energy(leaf)):
        gradient = gradients(loss, [leaf])[0]
        expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert gradient.is_contiguous(memory_format=expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 16, 7, 7),  # 16 bytes are parts of two channels
        (1, 72, 16, 16),  # channels for several blocks
        (1, 8, 17, 19),  # more columns of 16 bytes than a block has threads
        (3, 40, 2, 3),
    ],
    ids=str,
)
def test_wide_loads(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    def view(x: Tensor) -> Tensor:
        if layout == "misaligned":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        return LAYOUTS[layout](x)

    student, teacher = pair(shape, 24, dtype)
    check_op(lambda s, t: attention(view(s), view(t)), [student], constants=[teacher], upstream=1e3)
    check_op(lambda x: energy(view(x)), [student])


def test_maps_of_many_pixels() -> None:
    """More than a block of a GPU has room for."""
    for dtype, size in ((torch.float32, (112, 111)), (torch.float64, (80, 79))):
        student, teacher = pair((1, 2, *size), 1, dtype)
        check_op(lambda s, t: attention(s, t), [student], constants=[teacher], upstream=1e5)


def test_more_gradient_than_the_caches_keep(backend: str) -> None:
    if backend != "native" or os.environ.get("KDKERNELS_TEST_CUDA"):
        pytest.skip("the CPU's kernels write 16 MB of gradients in another way")
    shapes = [(2, 512, 32, 64), (2, 1024, 33, 33), (2, 3, 5, 5)]
    students, teachers = ([activations(*shape) for shape in shapes] for _ in range(2))
    views = [LAYOUTS["contiguous"], LAYOUTS["channels_last"], LAYOUTS["contiguous"]]

    def loss(*tensors: Tensor) -> Tensor:
        maps = [view(x) for x, view in zip(tensors, 2 * views, strict=True)]
        return attention(maps[:3], maps[3:])

    check_op(loss, students, constants=teachers, upstream=1e3)


def test_mixed_dtypes_of_student_and_teacher() -> None:
    student, teacher = pair((2, 3, 6, 6), 5)
    check_op(attention, [student.half()], constants=[teacher], upstream=1e4)


def test_contract() -> None:
    student, teacher = pair((3, 4, 5, 5), 6)
    for absolute in (False, True):
        check_contract(
            lambda s, a=absolute: attention([s, s * s], [teacher, teacher], layer_weights=[1.0, 2.0], absolute=a),
            student,
        )
    check_contract(lambda s: energy(s, normalize=True), student)
    check_contract(lambda s: energy(s, 3.0), student)


def test_compiled() -> None:
    student, teacher = pair((3, 4, 5, 5), 6)
    other = student.square()
    check_compiled(lambda s: attention([s, other], [teacher, teacher]), student)
    check_compiled(lambda s: energy(s, 1.0, True), student)


def test_opcheck() -> None:
    student, teacher = pair((2, 3, 4, 4), 5)
    leaf = student.clone().requires_grad_()
    ops = torch.ops.kdkernels
    for reduction, layer_reduction in (("mean", "sum"), ("none", "none")):
        options = ([teacher, teacher], [1.0, 2.0], reduction, layer_reduction, 2.0, False)
        opcheck(ops.attention.default, ([student, student], *options, True))
        opcheck(ops.attention_traced.default, ([leaf, student], *options, True))
    opcheck(ops.energy.default, (student, 2.0, True, True))
    opcheck(ops.energy_traced.default, (leaf, 2.0, True, True))
    opcheck(ops.energy_traced.default, (leaf, 3.0, False, True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    student = torch.zeros(shape, device=DEVICE, requires_grad=True)
    b, _, h, w = shape
    loss = attention(student, torch.zeros(b, 5, h, w, device=DEVICE))
    assert loss.item() == 0
    assert gradients(loss, [student])[0].shape == shape
    m = energy(student, normalize=True)
    assert m.shape == (b, h, w)
    assert (m == 0).all()
    assert gradients(m.sum(), [student])[0].shape == shape


def test_a_single_pixel_is_zero() -> None:
    student, teacher = (activations(3, c, 1, 1).requires_grad_() for c in (1, 3))
    for absolute in (False, True):
        loss = attention(student, teacher.detach(), absolute=absolute)
        assert loss.item() == 0
        assert (gradients(loss, [student])[0] == 0).all()


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_identical_networks(dtype: torch.dtype, absolute: bool) -> None:
    student = activations(2, 3, 8, 8, dtype=dtype).requires_grad_()
    loss = attention(student, student.detach(), absolute=absolute)
    assert loss.item() == 0
    assert (gradients(loss, [student], 1e3)[0] == 0).all()


@pytest.mark.parametrize("absolute", [False, True])
def test_dead_maps(absolute: bool) -> None:
    student, teacher = pair((5, 3, 6, 6), 5)
    student[1] = 0
    teacher[2] = 0
    student[3] *= 1e-7  # a map under the eps: its length is a constant
    teacher[4] *= 1e-7
    loss, (gradient,) = check_op(lambda s, t: attention(s, t, absolute=absolute), [student], constants=[teacher])
    assert loss.isfinite()
    assert (gradient[1] == 0).all()
    check_op(lambda x: energy(x, normalize=True), [student])


@pytest.mark.parametrize("scale", [1e-3, 1e4, 1e12])
def test_small_and_large_activations(scale: float) -> None:
    student, teacher = (x * scale for x in pair((2, 3, 6, 6), 4))
    check_op(attention, [student], constants=[teacher], upstream=1e4 * scale)
    check_op(lambda x: energy(x, normalize=True), [student], upstream=scale)


def test_energies_beyond_half_precision() -> None:
    student, teacher = pair((2, 8, 6, 6), 4, torch.float16)
    check_op(attention, [student * 1e4], constants=[teacher * 1e4], upstream=1e8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_inf_come_out(which: int, absolute: bool, bad: float) -> None:
    both = list(pair((3, 2, 4, 4), 3))
    both[which][1, 1, 2, 3] = bad
    student = both[0].requires_grad_()
    loss = attention(student, both[1], absolute=absolute)
    assert loss.isnan()
    gradient = gradients(loss, [student])[0]
    assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()
    if which == 0:
        assert energy(student)[1, 2, 3].isnan() == math.isnan(bad)
        assert energy(student, normalize=True)[1].isnan().any()
