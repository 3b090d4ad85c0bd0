"""softmax_kl on every backend: numbers against the definition in fp64, the contract, the edges."""

from __future__ import annotations

import math

import pytest
import torch
from checking import (
    DEVICE,
    DTYPES,
    by_definition,
    check_close,
    check_compiled,
    check_contract,
    check_op,
    gradients,
    opcheck,
)
from torch import Tensor

from kdkernels.ops.library import flatten
from kdkernels.ops.softmax_kl import Labels, Rows, Terms
from kdkernels.ops.softmax_kl import softmax_kl as op

TERMS = {
    "ce": {"ce": 0.7},
    "kl": {"kl": 1.3},
    "stkd": {"ce": 0.1, "kl": 14.4},
    "target": {"target_kl": 1.1},
    "non_target": {"non_target_kl": 8.0},
    "all": {"ce": 0.1, "kl": 0.3, "target_kl": 1.0, "non_target_kl": 8.0},
}
SHAPES = [(1, 2), (2, 3), (7, 13), (64, 100), (31, 401), (3, 1031), (2, 5003)]
pytestmark = pytest.mark.usefixtures("backend")


def softmax_kl(
    student: Tensor, teacher: Tensor, *labels: Tensor, temperature: float, reduction: str = "mean", **terms: float
) -> Tensor:
    return op(Rows(student, teacher, Labels(*labels), Terms(**terms), temperature, reduction))


def logits(n: int, c: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    return tuple((torch.randn(n, c, dtype=torch.float64) * scale).to(DEVICE, dtype) for _ in range(2))


def labels(n: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    a, b = (torch.randint(c, (n,), device=DEVICE) for _ in range(2))
    return a, b, torch.rand(n, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_terms_meet_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    student, teacher = logits(*shape, dtype)
    a, b, lam = labels(*shape)
    a[: len(a) // 3] = b[: len(a) // 3]  # equal labels add up to one
    check_op(
        lambda s, t, lam: softmax_kl(s, t, a, b, lam, temperature=4.0, **TERMS["all"]),
        [student],
        constants=[teacher, lam],
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("terms", list(TERMS))
def test_each_term_and_reduction(terms: str, reduction: str, temperature: float) -> None:
    student, teacher = logits(9, 41)
    a, b, lam = labels(9, 41)
    a[3] = -100
    b[5] = -100
    check_op(
        lambda s, t, lam: softmax_kl(s, t, a, b, lam, temperature=temperature, reduction=reduction, **TERMS[terms]),
        [student],
        constants=[teacher, lam],
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_one_label_or_two_with_one_lam_for_the_batch(mixed: bool) -> None:
    student, teacher = logits(8, 10)
    a, b, _ = labels(8, 10)
    extra = (b, torch.tensor(0.3, device=DEVICE)) if mixed else ()
    check_op(lambda s, t: softmax_kl(s, t, a, *extra, temperature=4.0, **TERMS["all"]), [student], constants=[teacher])


def test_dense_target() -> None:
    student, teacher = logits(8, 37)
    y = torch.rand(8, 37, device=DEVICE)  # not normalised: the gradient is p sum(y) - y
    check_op(
        lambda s, t, y: softmax_kl(s, t, y, temperature=3.0, ce=0.3, kl=0.9),
        [student],
        constants=[teacher, y],
    )


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
def test_strides(layout: str) -> None:
    student, teacher = logits(12, 30)
    views = {
        "transposed": lambda x: x.t().contiguous().t(),
        "sliced": lambda x: x.repeat(2, 2)[::2, ::2],
        "expanded": lambda x: x[:1].expand(12, 30),
        "offset": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    }
    a, b, lam = labels(12, 30)
    check_op(
        lambda s, t, lam: softmax_kl(views[layout](s), views[layout](t), a, b, lam, temperature=4.0, **TERMS["all"]),
        [student],
        constants=[teacher, lam],
    )


def test_mixed_dtypes_of_student_and_teacher() -> None:
    student, teacher = logits(8, 33)
    a, b, lam = labels(8, 33)
    check_op(
        lambda s, t, lam: softmax_kl(s, t, a, b, lam, temperature=4.0, **TERMS["all"]),
        [student.bfloat16()],
        constants=[teacher, lam],
    )


@pytest.mark.parametrize("terms", list(TERMS))
def test_contract(terms: str) -> None:
    student, teacher = logits(6, 21)
    a, b, lam = labels(6, 21)
    check_contract(lambda s: softmax_kl(s, teacher, a, b, lam, temperature=4.0, **TERMS[terms]), student)


def test_compiled() -> None:
    student, teacher = logits(6, 21)
    a, b, lam = labels(6, 21)
    check_compiled(lambda s: softmax_kl(s, teacher, a, b, lam, temperature=4.0, **TERMS["all"]), student)


def test_opcheck() -> None:
    student, teacher = logits(4, 6)
    a, b, lam = labels(4, 6)
    for reduction in ("mean", "sum", "none"):
        x = Rows(student, teacher, Labels(a, b, lam), Terms(0.1, 0.2, 0.3, 0.4), 4.0, reduction)
        opcheck(torch.ops.kdkernels.softmax_kl.default, (*flatten(x), True))
        x = x._replace(student=student.clone().requires_grad_())
        opcheck(torch.ops.kdkernels.softmax_kl_traced.default, (*flatten(x), True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty_batch_is_zero(reduction: str) -> None:
    student = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    loss = softmax_kl(student, student.detach(), target, temperature=4.0, reduction=reduction, **TERMS["all"])
    assert loss.item() == 0
    assert gradients(loss, [student])[0].shape == (0, 5)


def test_ignored_rows_leave_the_mean_and_get_no_gradient() -> None:
    student, teacher = logits(6, 5)
    student[1], student[4] = math.nan, math.inf  # what is in an ignored row does not matter
    student.requires_grad_()
    target = torch.tensor([0, -100, 2, 3, -100, 4], device=DEVICE)
    keep = [0, 2, 3, 5]
    loss = softmax_kl(student, teacher, target, temperature=2.0, **TERMS["all"])
    kept = softmax_kl(student[keep], teacher[keep], target[keep], temperature=2.0, **TERMS["all"])
    torch.testing.assert_close(loss, kept)
    gradient = gradients(loss, [student])[0]
    assert (gradient[[1, 4]] == 0).all()
    torch.testing.assert_close(gradient[keep], gradients(kept, [student])[0][keep])
    nothing = softmax_kl(student, teacher, torch.full_like(target, -100), temperature=2.0, **TERMS["all"])
    assert nothing.item() == 0
    assert (gradients(nothing, [student])[0] == 0).all()


@pytest.mark.parametrize("classes", [1, 2])
def test_no_other_class_is_left(classes: int) -> None:
    student, teacher = logits(3, classes, torch.float64)
    a, b = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.full((3,), classes - 1, device=DEVICE)
    lam = torch.full((3,), 0.3, dtype=torch.float64, device=DEVICE)
    loss, (gradient,) = check_op(
        lambda s, t, lam: softmax_kl(s, t, a, b, lam, temperature=2.0, target_kl=1.0, non_target_kl=8.0),
        [student.float()],
        constants=[teacher.float(), lam.float()],
    )
    _, (expected,) = check_op(
        lambda s, t: softmax_kl(s, t, temperature=2.0, kl=1.0), [student.float()], constants=[teacher.float()]
    )
    torch.testing.assert_close(gradient, expected)  # TCKD is the whole KL
    assert loss.isfinite()


@pytest.mark.parametrize("scale", [1e4, 6e4])
def test_huge_logits(scale: float) -> None:
    student, teacher = logits(16, 50, scale=scale)
    a, b, lam = labels(16, 50)
    _, (gradient,) = check_op(
        lambda s, t, lam: softmax_kl(s, t, a, b, lam, temperature=1.0, **TERMS["all"]),
        [student],
        constants=[teacher, lam],
    )
    assert gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("size", [1, 30, 300])
def test_maxima_at_the_end_of_a_row(size: int, temperature: float) -> None:
    student, teacher = (x + torch.linspace(-size, size, 300, device=DEVICE) for x in logits(3, 300))
    student[1], teacher[2] = student[1].flip(0), teacher[2].flip(0)
    a, b, lam = labels(3, 300)
    check_op(
        lambda s, t, lam: softmax_kl(s, t, a, b, lam, temperature=temperature, **TERMS["all"]),
        [student],
        constants=[teacher, lam],
    )


def test_a_common_offset_costs_no_digits() -> None:
    student, teacher = logits(8, 20)
    offset = 2.0**13  # exact in fp32 beside logits rounded to 2^-10
    student, teacher = ((x * 1024).round() / 1024 for x in (student, teacher))
    a, b, lam = labels(8, 20)
    call = lambda s, t: softmax_kl(s, t, a, b, lam, temperature=3.0, **TERMS["all"])  # noqa: E731
    torch.testing.assert_close(call(student + offset, teacher - offset), call(student, teacher), rtol=1e-6, atol=0)


def test_identical_logits_have_zero_divergence() -> None:
    student, _ = logits(8, 100, scale=5)
    student.requires_grad_()
    loss = softmax_kl(student, student.detach(), temperature=4.0, kl=16.0)
    assert loss.item() == 0
    assert (gradients(loss, [student])[0] == 0).all()


@pytest.mark.parametrize("terms", ["kl", "non_target"])
@pytest.mark.parametrize("difference", [0.1, 1e-2, 1e-3])
def test_close_networks_keep_their_digits(difference: float, terms: str) -> None:
    teacher, noise = logits(16, 200, scale=3)
    student = teacher + difference * noise
    target = torch.arange(16, device=DEVICE)
    call = lambda s, t: softmax_kl(s, t, target, temperature=4.0, reduction="none", **TERMS[terms])  # noqa: E731
    with by_definition():
        exact = call(student.double(), teacher.double())
    relative = ((call(student, teacher) - exact) / exact).abs().max().item()
    assert relative < 1e-6 / difference  # what the rounding of the logits alone may cost


def test_minus_infinity_is_a_class_with_no_probability() -> None:
    student, teacher = logits(4, 6)
    student[:, 2] = teacher[:, 2] = -math.inf
    a = torch.tensor([0, 1, 3, 4], device=DEVICE)
    keep = [0, 1, 3, 4, 5]
    student.requires_grad_()
    loss = softmax_kl(student, teacher, a, temperature=2.0, **TERMS["all"])
    index = torch.tensor([0, 1, 2, 3], device=DEVICE)
    kept = softmax_kl(student[:, keep], teacher[:, keep], index, temperature=2.0, **TERMS["all"])
    torch.testing.assert_close(loss, kept)
    gradient = gradients(loss, [student])[0]
    assert (gradient[:, 2] == 0).all()
    torch.testing.assert_close(gradient, gradients(kept, [student])[0])


@pytest.mark.parametrize("place", ["labelled", "other"])
@pytest.mark.parametrize("terms", list(TERMS))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_come_out(bad: float, terms: str, place: str) -> None:
    for which in (0, 1) if terms != "ce" else (0,):
        pair = list(logits(4, 6))
        pair[which][2, 2 if place == "labelled" else 5] = bad
        student, teacher = pair[0].requires_grad_(), pair[1]
        target = torch.tensor([0, 1, 2, 3], device=DEVICE)
        rows = softmax_kl(student, teacher, target, temperature=2.0, reduction="none", **TERMS[terms])
        assert rows[2].isnan()
        assert rows[[0, 1, 3]].isfinite().all()
        gradient = gradients(rows, [student])[0]
        assert gradient[2].isnan().any()
        assert gradient[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["hard", "mixed", "dense"])
@pytest.mark.parametrize("classes", [2, 41])
def test_label_smoothing(classes: int, kind: str, dtype: torch.dtype) -> None:
    smooth_labels_meet_the_definition(classes, kind, dtype)


def test_label_smoothing_of_long_rows() -> None:
    smooth_labels_meet_the_definition(9001, "mixed", torch.float32)


def smooth_labels_meet_the_definition(classes: int, kind: str, dtype: torch.dtype) -> None:
    student, teacher = logits(6, classes, dtype)
    a, b, lam = labels(6, classes)
    a[1] = -100
    dense = torch.rand(6, classes, device=DEVICE)
    given = {"hard": Labels(a), "mixed": Labels(a, b, lam), "dense": Labels(dense)}[kind]._replace(smoothing=0.3)
    terms = Terms(ce=0.7, kl=1.3)
    check_op(lambda s, t: op(Rows(s, t, given, terms, 4.0, "none")), [student], constants=[teacher])


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_that_of_cross_entropy(smoothing: float) -> None:
    student, teacher = logits(7, 13)
    target = torch.tensor([0, 5, -100, 12, 3, 3, 1], device=DEVICE)
    rows = Rows(student, teacher, Labels(target, smoothing=smoothing), Terms(ce=1.0))
    expected = torch.nn.functional.cross_entropy(student.double(), target, label_smoothing=smoothing)
    check_close("cross entropy", op(rows), expected, 1e-6)
