"""Where a guard takes over: eps of norms, clamps, cutoffs, ties of rounding, the sizes at which loops change."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from checking import DEVICE, HALF, check_close, check_op, gradients
from torch import Tensor

from kdkernels.ops.angular_margin import ActivationPairs, angular_margin
from kdkernels.ops.energy import Activation, AttentionPairs, attention, energy
from kdkernels.ops.gram import LayerPairs, SPOptions, cosine_similarity, sp_gram
from kdkernels.ops.softmax_kl import Labels, Rows, Terms, softmax_kl

pytestmark = pytest.mark.usefixtures("backend")
ON_CPU = DEVICE == "cpu" and not os.environ.get("KDKERNELS_TEST_CUDA")


@pytest.fixture
def native_cpu(backend: str) -> None:
    """For what the CPU's kernels have ways of their own: halves, blocks of pixels, threads."""
    if not ON_CPU or backend != "native":
        pytest.skip("not of the native kernels for CPUs")


FLOATS = (torch.float64, torch.float32)


def angular(student: Tensor, teacher: Tensor, local_weight: float = 0.0) -> Tensor:
    return angular_margin(ActivationPairs([student], [teacher], [1.0], local_weight=local_weight))


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE)


# ---- gram


@pytest.mark.parametrize("row_norm", ["l2", "l1"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_a_gram_matrix_below_its_eps(dtype: torch.dtype, row_norm: str) -> None:
    """Their norm is a constant, and so is not differentiated."""
    student, teacher = (torch.rand(6, 5, dtype=torch.float64).add(0.1).to(DEVICE, dtype) for _ in range(2))
    student[:3] *= 0.01
    teacher[1] *= 0.01
    options = SPOptions([1.0], reduction="sum", row_norm=row_norm, eps=0.5)
    check_op(lambda s, t: sp_gram(LayerPairs([s], [t], options)), [student], constants=[teacher])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_cosines_of_rows_below_their_eps(dtype: torch.dtype) -> None:
    a, b = (torch.randn(n, 7, dtype=torch.float64).to(DEVICE, dtype) for n in (3, 4))
    check_op(cosine_similarity, [1e-9 * a, 1e-9 * b])  # alone: their gradients are a hundred million times the others'
    check_op(cosine_similarity, [torch.cat([a, 3e-9 * a]), b])
    check_op(cosine_similarity, [a, torch.cat([b, 3e-9 * b])])


# ---- maps


@pytest.mark.parametrize(("left", "dtype"), [(3e-7, torch.float64), (1e-8, torch.float64), (1e-8, torch.float32)])
def test_a_pixel_with_nearly_all_the_energy(left: float, dtype: torch.dtype) -> None:
    """Its q is 1 - left, below and above the clamp, under which alone u has a slope. fp32 rounds the first to 4e-7."""
    student, teacher = maps(2, 3, 4, 5).abs() + 0.1, maps(2, 4, 4, 5)
    student *= (1e4 * math.sqrt(2 * left) / student.square().sum(1).norm()) ** 0.5
    student[:, :, 0, 0] = 1e2 / math.sqrt(3)
    check_op(angular, [student.to(dtype)], constants=[teacher.to(dtype)], upstream=1e6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_regions_just_longer_than_the_eps(dtype: torch.dtype) -> None:
    """A quadrant of one pixel, whose G is 1e-11 long: a unit vector all the same."""
    student, teacher = (
        torch.tensor(r, dtype=torch.float64, device=DEVICE).sqrt().view(1, 1, 2, 2)
        for r in ((0.782, 0.36, 0.36, 0.36), (0.5, 0.4, 0.6, 0.5))
    )
    check_op(lambda s, t: angular(s, t, 0.5), [student.to(dtype)], constants=[teacher.to(dtype)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_maps_just_longer_than_the_eps(dtype: torch.dtype) -> None:
    student, teacher = (4e-6 * maps(3, c, 5, 4) for c in (3, 2))  # energies of 1e-11
    check_op(
        lambda s, t: attention(AttentionPairs([s], [t], [1.0])),
        [student.to(dtype)],
        constants=[teacher.to(dtype)],
        upstream=1e-6,
    )


def test_energies_whose_squares_overflow() -> None:
    student, teacher = (1e12 * maps(2, c, 5, 4).float() for c in (3, 2))
    check_op(angular, [student], constants=[teacher], upstream=1e12)
    check_op(lambda s, t: attention(AttentionPairs([s], [t], [1.0])), [student], constants=[teacher], upstream=1e12)


@pytest.mark.usefixtures("native_cpu")
@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_maps_of_more_pixels_than_are_summed_at_once(dtype: torch.dtype, channels: int) -> None:
    x = maps(2, channels, 46, 47).to(dtype)
    check_op(lambda x: energy(Activation(x)), [x])


# ---- softmax_kl


@pytest.mark.parametrize("term", ["target_kl", "non_target_kl"])
@pytest.mark.parametrize("above", [-14.0, 14.0])
@pytest.mark.parametrize("two", [False, True])
def test_labels_with_next_to_none_or_all_of_the_probability(two: bool, above: float, term: str) -> None:
    """1e-6 of it on one side, which is where its digits are."""
    student, teacher = (torch.randn(6, 9, device=DEVICE) for _ in range(2))
    a = torch.arange(6, device=DEVICE)
    for z, more in ((student, above), (teacher, above + 1)):
        z[a, a] += more
        if two:
            z[a, a + 1] += more
    labels = Labels(a, a + 1, torch.tensor(0.4, device=DEVICE)) if two else Labels(a)
    check_op(lambda s, t: softmax_kl(Rows(s, t, labels, Terms(**{term: 1.0}))), [student], constants=[teacher])


def test_a_teacher_that_gives_the_others_nothing() -> None:
    student, teacher = torch.randn(3, 5, device=DEVICE), torch.full((3, 5), -math.inf, device=DEVICE)
    a = torch.tensor([0, 2, 4], device=DEVICE)
    teacher[torch.arange(3, device=DEVICE), a] = 1.0
    student.requires_grad_()
    rows = lambda **t: softmax_kl(Rows(student, teacher, Labels(a), Terms(**t), 2.0, "none"))  # noqa: E731
    assert (rows(non_target_kl=1.0) == 0).all()
    # without others TCKD is the cross entropy
    expected = -(student / 2).log_softmax(1).gather(1, a[:, None])[:, 0]
    check_close("TCKD", rows(target_kl=1.0), expected, 1e-6)
    actual, exact = (gradients(x, [student])[0] for x in (rows(target_kl=1.0), expected))
    check_close("gradient", actual, exact, 1e-6)


def test_a_student_that_gives_the_others_nothing() -> None:
    student, teacher = torch.full((2, 5), -math.inf, device=DEVICE), torch.randn(2, 5, device=DEVICE)
    a = torch.tensor([0, 2], device=DEVICE)
    student[[0, 1], a] = 1.0
    rows = softmax_kl(Rows(student, teacher, Labels(a), Terms(non_target_kl=1.0), 2.0, "none"))
    assert rows.isposinf().all()


def test_dense_labels_of_no_weight_beside_impossible_classes() -> None:
    student, y = torch.randn(4, 9, device=DEVICE), torch.rand(4, 9, device=DEVICE)
    student[:, 2] = -math.inf
    y[:, 2] = 0
    check_op(lambda s, y: softmax_kl(Rows(s, s.detach(), Labels(y), Terms(ce=1.0))), [student], constants=[y])


@pytest.mark.parametrize("terms", [Terms(ce=1.0), Terms(kl=1.0)])
def test_small_probabilities_keep_their_digits_down_to_the_smallest(terms: Terms) -> None:
    """Each by itself: in a norm they vanish."""
    student = -torch.linspace(0, 150, 601, device=DEVICE).expand(2, -1)
    teacher = torch.full_like(student, -1e4)
    teacher[:, 0] = 0  # all of it
    labels = Labels(torch.zeros(2, dtype=torch.int64, device=DEVICE))
    student = student.clone().requires_grad_()
    actual = gradients(softmax_kl(Rows(student, teacher, labels, terms, reduction="sum")), [student])[0].double()
    expected = student.detach().double().softmax(1)
    expected[:, 0] -= 1
    error = (actual - expected).abs()
    assert (error <= 2e-5 * expected.abs() + 2e-38).all(), (error / expected.abs()).max()


# ---- numbers of 16 bits


def _halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def _shapes(x: Tensor) -> list[Tensor]:
    """As one long map, and as maps of fifteen pixels, shorter than a vector."""
    short = torch.cat([x, x.new_zeros(-len(x) % 15)])
    return [x.view(1, 1, 1, -1), short.view(-1, 1, 3, 5)]


@pytest.mark.usefixtures("native_cpu")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_half_is_read_as_it_is(dtype: torch.dtype) -> None:
    for x in _shapes(_halves(dtype)):
        actual, expected = energy(Activation(x)), x.float().square().sum(1)
        assert torch.equal(actual.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.usefixtures("native_cpu")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_are_rounded_to_even(dtype: torch.dtype) -> None:
    """Every half, what is midway to the next, and the numbers beside that."""
    x = _halves(dtype).float()
    x = x[x.isfinite()].sort().values
    middle = ((x[1:].double() + x[:-1].double()) / 2).float()
    up, down = (torch.nextafter(middle, torch.tensor(side)) for side in (math.inf, -math.inf))
    edge = torch.finfo(dtype).max * torch.tensor([1.0001, 1.0002, 1.001, 1.01, 2.0, math.inf, math.nan])
    wanted = torch.cat([x, middle, up, down, edge, -edge])
    for x, y in ((1.0, wanted[wanted.abs() > 1]), (0.5, wanted[~(wanted.abs() > 1)])):
        for upstream in _shapes(y / (2 * x)):
            leaf = torch.full_like(upstream, x, dtype=dtype).requires_grad_()
            gradient = torch.autograd.grad(energy(Activation(leaf)), leaf, upstream[:, 0])[0]  # 2 g x
            expected = (2 * upstream * x).to(dtype)
            assert torch.equal(gradient.nan_to_num(-1.0), expected.nan_to_num(-1.0))


# ---- work that several threads share


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def _sp(s: Tensor, t: Tensor) -> Tensor:
    return sp_gram(LayerPairs([s, s * s], [t, t], SPOptions([1.0, 2.0])))


def _rows(s: Tensor, t: Tensor) -> Tensor:
    a = torch.arange(len(s))
    return softmax_kl(Rows(s, t, Labels(a, a + 1, torch.tensor(0.3)), Terms(0.1, 0.3, 1.0, 8.0), 4.0))


SHARED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "cosines": (cosine_similarity, (67, 2100), (61, 2100)),
    "narrow cosines": (cosine_similarity, (130, 50), (120, 50)),  # fewer slices of columns than threads
    "sp": (_sp, (130, 700), (130, 40)),
    "softmax_kl": (_rows, (61, 1300), (61, 1300)),
    "attention": (lambda s, t: attention(AttentionPairs([s, s], [t, t], [1.0, 2.0])), (5, 3, 9, 7), (5, 2, 9, 7)),
    "angular": (lambda s, t: angular(s, t, 0.2), (5, 3, 9, 7), (5, 2, 9, 7)),
}


@pytest.mark.usefixtures("native_cpu", "three_threads")
@pytest.mark.parametrize("op", list(SHARED))
def test_what_threads_share_is_whole(op: str) -> None:
    function, *shapes = SHARED[op]
    student, teacher = (maps(*shape).float() for shape in shapes)
    check_op(function, [student], constants=[teacher], upstream=1e3)
    if "cosines" in op:
        check_op(lambda t, s: cosine_similarity(s, t), [teacher], constants=[student])
