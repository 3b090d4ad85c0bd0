"""Where arithmetic loses digits: near equality, at high temperatures, of very large and very small numbers."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from checking import DEVICE, backends_under_test, by_definition, check_close, check_op, gradients
from torch import Tensor

import kdkernels as kd
from benchmarks.accuracy import ONE_ULP, STATES, measure
from benchmarks.accuracy_cases import cases
from benchmarks.accuracy_tables import PAGE, read
from kdkernels.ops.backend import why_not

N, C = 16, 40
TARGET, MIXED = torch.arange(N, device=DEVICE), (torch.arange(N, device=DEVICE) + 3) % C
CUDA_ON_CPU = bool(os.environ.get("KDKERNELS_TEST_CUDA"))


def near(noise: float, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    teacher = torch.randn(N, C, dtype=torch.float64, device=DEVICE) * scale
    student = teacher + noise * scale * torch.randn_like(teacher)
    return student.to(dtype), teacher.to(dtype)


def decoupled(temperature: float, weights: tuple[float, float], two: bool) -> Callable[[Tensor, Tensor], Tensor]:
    labels = {"target_mixed": MIXED, "lam": torch.full((), 0.7, device=DEVICE)} if two else {}
    return lambda s, t: kd.stkd_loss(
        s, t, TARGET, **labels, ce_weight=0.0, kd_weight=1.0, temperature=temperature, decouple=weights
    )


@pytest.mark.parametrize("two", [False, True], ids=["one label", "two"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["TCKD", "NCKD"])
@pytest.mark.parametrize("temperature", [20.0, 1000.0])
@pytest.mark.usefixtures("backend")
def test_decoupled_terms_at_high_temperatures(temperature: float, weights: tuple[float, float], two: bool) -> None:
    student, teacher = torch.randn(2, N, C, device=DEVICE) * 3
    check_op(decoupled(temperature, weights, two), [student], constants=[teacher])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("backend")
def test_the_target_term_is_never_negative(dtype: torch.dtype) -> None:
    for noise in (1e-1, 1e-3, 1e-5):
        student, teacher = near(noise, dtype)
        loss = decoupled(1000.0, (1.0, 0.0), True)
        rows = kd.stkd_loss(
            student, teacher, TARGET, MIXED, 0.7, temperature=1000.0, decouple=(1.0, 0.0), ce_weight=0, reduction="none"
        )
        assert (rows >= 0).all()
        with by_definition():
            expected = loss(student.double(), teacher.double())
        if noise > 1e-2:
            check_close("loss", loss(student, teacher), expected, 1e-5)


@pytest.mark.usefixtures("backend")
def test_labels_far_above_the_others() -> None:
    """The others are measured from their own maximum."""
    student, teacher = torch.randn(2, N, C, device=DEVICE)
    for x in (student, teacher):
        x[torch.arange(N), TARGET] += 600
    check_op(decoupled(1.0, (1.0, 8.0), False), [student], constants=[teacher])


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_kd_keeps_its_digits_near_equality(backend: str, noise: float) -> None:
    student, teacher = near(noise)
    losses = (kd.kd_loss, decoupled(4.0, (1.0, 8.0), True))
    if backend != "reference" and not CUDA_ON_CPU:
        for loss in losses:
            check_op(loss, [student], constants=[teacher])
        return
    for loss in losses:  # subtracted after the division by T: as far off as half an ulp of the logits makes them
        student.requires_grad_()
        value, gradient = loss(student, teacher), gradients(loss(student, teacher), [student])[0]
        with by_definition():
            exact = student.detach().double().requires_grad_()
            expected = loss(exact, teacher.double())
        check_close("loss", value, expected, 6e-8 / noise)
        check_close("gradient", gradient, gradients(expected, [exact])[0], 2e-7 / noise)


@pytest.mark.usefixtures("backend")
def test_a_difference_of_an_ulp_in_small_logits_shows() -> None:
    """In the gradient; the loss is less than float64 resolves."""
    student = torch.full((2, 64), 1e-6, dtype=torch.bfloat16, device=DEVICE)
    teacher = student.clone()
    teacher[0, 5] *= 1.01
    assert teacher[0, 5] != student[0, 5]
    exact, student = student.double().requires_grad_(), student.requires_grad_()
    gradient = gradients(kd.kd_loss(student, teacher, temperature=20.0), [student])[0]
    with by_definition():
        expected = gradients(kd.kd_loss(exact, teacher.double(), temperature=20.0), [exact])[0]
    check_close("gradient", gradient, expected, 1e-4, torch.bfloat16)


def by_formula(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (x.double() / x.double().norm(dim=1, keepdim=True).clamp(min=1e-8) for x in (student, teacher))
    return (2 - 2 * (s * t).sum(1)).mean()


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_alignment_near_equality(noise: float) -> None:
    student, teacher = near(noise)
    loss = kd.alignment_loss(student, teacher)
    check_close("loss", loss, by_formula(student, teacher), 2e-7 / noise)
    assert (kd.alignment_loss(student, teacher, reduction="none") >= 0).all()
    assert kd.alignment_loss(teacher, teacher).item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_alignment_below_its_eps_and_of_large_rows(dtype: torch.dtype) -> None:
    """A short row's norm is a constant; torch's own cosine takes it for a variable."""
    for scale in (1e-10, 1e20):
        student = (scale * torch.randn(4, 6, dtype=dtype, device=DEVICE)).requires_grad_()
        teacher = torch.randn(4, 6, dtype=dtype, device=DEVICE)
        exact = student.detach().double().requires_grad_()
        loss, expected = kd.alignment_loss(student, teacher), by_formula(exact, teacher)
        check_close("loss", loss, expected, 1e-6)
        check_close("gradient", gradients(loss, [student])[0], gradients(expected, [exact])[0], 1e-6)


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.usefixtures("backend")
def test_float16_zero_rows_get_no_gradient_from_the_correlation(views: int) -> None:
    student, teacher = torch.randn(2, 8, 6, device=DEVICE).half()
    student[3] = 0
    student.requires_grad_()
    gradient = gradients(kd.correlation_loss(student, teacher, views=views), [student])[0]
    assert gradient.isfinite().all()
    assert not gradient[3].any()
    others = torch.arange(8, device=DEVICE) != 3
    exact = student.detach().double().requires_grad_()
    with by_definition():
        expected = gradients(kd.correlation_loss(exact, teacher.double(), views=views), [exact])[0]
    check_close("gradient", gradient[others], expected[others], 1e-5, torch.float16)


def test_cosines_of_large_rows() -> None:
    x = torch.tensor([[1e21, 1e20], [1e20, -1e21]], device=DEVICE)
    with kd.use_backend("reference"):
        torch.testing.assert_close(kd.cosine_similarity(x, x), torch.eye(2, device=DEVICE))


@pytest.mark.skipif(CUDA_ON_CPU, reason="only some ops have CUDA kernels")
def test_mixed_dtypes_of_an_empty_batch() -> None:
    for loss in (
        kd.kd_loss,
        kd.sp_loss,
        kd.alignment_loss,
        kd.correlation_loss,
        kd.rkd_loss,
        kd.pkt_loss,
        kd.dist_loss,
    ):
        for dtypes in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
            student, teacher = (torch.zeros(0, 4, dtype=d, device=DEVICE) for d in dtypes)
            value = loss(student.requires_grad_(), teacher)
            assert value.dtype == torch.float64
            assert gradients(value, [student])[0].dtype == dtypes[0]


def test_mlkd_gives_its_teacher_no_gradient() -> None:
    student, teacher = (torch.randn(8, 6, device=DEVICE, requires_grad=True) for _ in range(2))
    kd.mlkd_loss(student, teacher, torch.tensor([0, 1], device=DEVICE)).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.skipif(DEVICE != "cpu", reason="labels on an accelerator are not read")
def test_compiled_corsd_refuses_a_label_of_minus_100() -> None:
    relations, logits, labels = torch.rand(2, 3), torch.randn(2, 3, 5), torch.tensor([0, -100, 2])
    compiled = torch.compile(kd.corsd_loss, backend="aot_eager")
    with pytest.raises(ValueError, match="-100"):
        compiled(relations, relations, logits, logits, labels, labels)


QUICK = ("kd", "stkd, TCKD", "sp", "alignment", "rkd")


@pytest.mark.skipif(DEVICE != "cpu" or CUDA_ON_CPU, reason="the tables are of the CPU")
@pytest.mark.parametrize("state", STATES[:4], ids=lambda state: state.title)
def test_the_tables_are_upper_bounds(state: object) -> None:
    tables = read(PAGE)
    assert tables.keys() == {s.title for s in STATES}
    backends = [b for b in backends_under_test() if why_not("softmax_kl", b, torch.ones(2, 2)) is None]
    for case in cases():
        assert case.name in tables[state.title]
        if case.name in QUICK:
            table = tables[state.title][case.name]
            for column, errors in measure(case, state, backends, ulp=False).items():
                for error, bound, ulp in zip(errors, table[column], table[ONE_ULP], strict=True):
                    # another order of summing may be off by as much as the inputs, where this one happened not to be
                    assert error <= max(bound, ulp), (case.name, column)
