"""softmax_kl's divergences and standardised logits on every backend: against the definition in fp64, and the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from checking import (
    DEVICE,
    DTYPES,
    TOLERANCES,
    by_definition,
    check_close,
    check_compiled,
    check_contract,
    check_op,
    gradients,
    opcheck,
    refused,
)
from torch import Tensor

from kdkernels.ops.backend import choose
from kdkernels.ops.library import flatten
from kdkernels.ops.softmax_kl import Labels, Rows, Terms, softmax_kl

DIVERGENCES = [
    ("reverse", 0.5),
    ("jsd", 0.5),
    ("jsd", 0.1),
    ("skew", 0.1),
    ("skew_reverse", 0.1),
    ("skew_reverse", 0.7),
]
ALL = [("forward", 0.5), *DIVERGENCES]
pytestmark = pytest.mark.usefixtures("backend")


def logits(n: int, c: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    return tuple((torch.randn(n, c, dtype=torch.float64) * scale).to(DEVICE, dtype) for _ in range(2))


def run(
    student: Tensor, teacher: Tensor, divergence: tuple[str, float], standardize: bool = False, **terms: Any
) -> Tensor:
    """Rows of their own, at T = 2.5, unless given."""
    given = {"terms": Terms(kl=1.7), "temperature": 2.5, "reduction": "none"} | terms
    name, beta = divergence
    return softmax_kl(Rows(student, teacher, divergence=name, beta=beta, standardize=standardize, **given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_divergences_beside_labels(divergence: tuple[str, float], dtype: torch.dtype) -> None:
    for n, c, scale in ((1, 2, 2.0), (7, 13, 0.3), (9, 50, 3.0)):
        student, teacher = logits(n, c, dtype, scale)
        a, b = (torch.randint(c, (n,), device=DEVICE) for _ in range(2))
        a[3:4] = -100
        labels = Labels(a, b, torch.tensor(0.3, device=DEVICE), smoothing=0.1)
        given = {"labels": labels, "terms": Terms(ce=0.3, kl=1.7)}
        check_op(lambda s, t, given=given: run(s, t, divergence, **given), [student], constants=[teacher])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ALL[::2], ids=str)
def test_standardised_logits(divergence: tuple[str, float], dtype: torch.dtype) -> None:
    for n, c in ((2, 3), (9, 37)):
        student, teacher = logits(n, c, dtype, 5.0)
        given = {"labels": Labels(torch.arange(n, device=DEVICE)), "terms": Terms(ce=0.3, kl=1.7)}
        check_op(lambda s, t, given=given: run(s, t, divergence, True, **given), [student], constants=[teacher])


@pytest.mark.parametrize(("classes", "dtype"), [(7001, torch.float32), (15001, torch.float64)], ids=str)
def test_long_rows(classes: int, dtype: torch.dtype) -> None:
    student, teacher = logits(1, classes, dtype)
    check_op(lambda s, t: run(s, t, ("reverse", 0.5), True), [student], constants=[teacher])


def test_standardised_logits_of_decoupled_terms() -> None:
    student, teacher = logits(9, 37)
    a, b = (torch.randint(37, (9,), device=DEVICE) for _ in range(2))
    given = {"labels": Labels(a, b, torch.rand(9, device=DEVICE)), "terms": Terms(0.1, 0.3, 1.0, 8.0)}
    check_op(lambda s, t: run(s, t, ("forward", 0.5), True, **given), [student], constants=[teacher])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("standardize", [False, True])
def test_long_rows_dense_targets_and_reductions(standardize: bool, reduction: str) -> None:
    student, teacher = logits(2, 9001)
    given = {"labels": Labels(torch.rand(2, 9001, device=DEVICE)), "terms": Terms(ce=0.3, kl=1.7)}
    call = lambda s, t: run(s, t, ("jsd", 0.3), standardize, reduction=reduction, **given)  # noqa: E731
    check_op(call, [student], constants=[teacher])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
def test_strides(layout: str) -> None:
    student, teacher = logits(12, 30)
    views = {
        "transposed": lambda x: x.t().contiguous().t(),
        "sliced": lambda x: x.repeat(2, 2)[::2, ::2],
        "expanded": lambda x: x[:1].expand(12, 30),
        "offset": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    }
    view = views[layout]
    check_op(lambda s, t: run(view(s), view(t), ("skew_reverse", 0.2), True), [student], constants=[teacher])


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_identical_networks_have_no_divergence_and_no_gradient(divergence: tuple[str, float]) -> None:
    for standardize in (False, True):
        student, _ = logits(8, 100, scale=5)
        student.requires_grad_()
        rows = run(student, student.detach(), divergence, standardize)
        assert (rows == 0).all()
        assert (gradients(rows, [student])[0] == 0).all()


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_close_networks_keep_their_digits(divergence: tuple[str, float], difference: float) -> None:
    """What remains is the rounding of z - max and of exponentials, 1e-7, over the difference."""
    teacher, noise = logits(16, 200, scale=3)
    student = (teacher + difference * noise).requires_grad_()
    rows = run(student, teacher, divergence, temperature=4.0)
    exact = student.detach().double().requires_grad_()
    with by_definition():
        expected = run(exact, teacher.double(), divergence, temperature=4.0)
    assert ((rows - expected) / expected).abs().max() < 2e-7 / difference
    check_close(
        "gradient", gradients(rows.sum(), [student])[0], gradients(expected.sum(), [exact])[0], 6e-7 / difference
    )


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_gradients_are_those_of_differences(divergence: tuple[str, float]) -> None:
    student, teacher = logits(2, 4, torch.float64)
    for standardize in (False, True):
        call = lambda s, standardize=standardize: run(s, teacher, divergence, standardize)  # noqa: E731
        if refused(call, student):
            return
        assert torch.autograd.gradcheck(call, student.requires_grad_())


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_huge_logits(divergence: tuple[str, float], scale: float) -> None:
    student, teacher = logits(16, 50, scale=scale)
    exact = student.double().requires_grad_()
    with by_definition():
        expected = run(exact, teacher.double(), divergence, temperature=1.0)
    rows = run(student.requires_grad_(), teacher, divergence, temperature=1.0)
    check_close("loss", rows, expected, TOLERANCES[torch.float32].loss)
    error = gradients(rows.sum(), [student])[0] - gradients(expected.sum(), [exact])[0]
    assert error.abs().max() < 3e-7 * scale  # nearly all of it is 0, and a logit's rounding that large


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_classes_without_probability(divergence: tuple[str, float]) -> None:
    student, teacher = logits(4, 6)
    student[:, 2] = teacher[:, 2] = -math.inf
    call = lambda s, t: run(s, t, divergence)  # noqa: E731
    check_op(call, [student], constants=[teacher])
    only_student, only_teacher = student.clone(), teacher.clone()
    only_student[:, 4] = only_teacher[:, 4] = -math.inf
    infinite = call(only_student, teacher), call(student, only_teacher)  # q = 0 < p, and p = 0 < q
    assert infinite[0].isposinf().all() == (divergence[0] == "forward")
    assert infinite[1].isposinf().all() == (divergence[0] == "reverse")
    if divergence[0] != "forward":
        check_op(call, [only_student], constants=[teacher])
    if divergence[0] != "reverse":
        check_op(call, [student], constants=[only_teacher])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_nan_and_inf_come_out(divergence: tuple[str, float], bad: float) -> None:
    for which in (0, 1):
        for standardize in (False, True):
            pair = list(logits(4, 6))
            pair[which][2, 3] = bad
            student = pair[0].requires_grad_()
            rows = run(student, pair[1], divergence, standardize)
            gradient = gradients(rows, [student])[0]
            assert rows[2].isnan()
            assert gradient[2].isnan().any()
            assert rows[[0, 1, 3]].isfinite().all()
            assert gradient[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_logits_without_spread_become_zeros(divergence: tuple[str, float]) -> None:
    student, teacher = logits(4, 7)
    student[1:3], teacher[2:] = 0.1, 1e4
    rows = run(student, teacher, divergence, True)
    zeros = run(torch.zeros_like(student), teacher, divergence, True)
    torch.testing.assert_close(rows[1], zeros[1])
    assert rows[2] == 0
    one = torch.ones(3, 1, device=DEVICE, requires_grad=True)
    rows = run(one, one.detach(), divergence, True)
    assert (rows == 0).all()
    assert (gradients(rows, [one])[0] == 0).all()


def parts(x: Rows) -> tuple[Any, Tensor, Tensor, Tensor]:
    implementation = choose("softmax_kl", x.student, x.teacher)
    loss, stats, scale = implementation.forward(x, True)
    return implementation, torch.linspace(1, 2, len(loss), dtype=loss.dtype, device=DEVICE), stats, scale


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_gradient_in_the_place_of_the_logits(dtype: torch.dtype) -> None:
    student, teacher = logits(5, 23, dtype)
    target = torch.tensor([0, 1, -100, 3, 22], device=DEVICE)
    mixed = Labels(target, target.flip(0), torch.rand(5, device=DEVICE))
    for terms, name, standardize in (
        (Terms(ce=0.3, kl=1.0), "forward", False),
        (Terms(ce=0.3, kl=1.0), "jsd", True),
        (Terms(0.1, 0.2, 0.3, 0.4), "forward", True),
    ):
        x = Rows(student.clone(), teacher, mixed, terms, 3.0, "none", name, 0.3, standardize)
        implementation, grad, stats, scale = parts(x)
        expected = implementation.backward(grad, x, stats, scale)
        assert torch.equal(x.student, student)
        written = implementation.backward(grad, x, stats, scale, in_place=True)
        assert written.data_ptr() == x.student.data_ptr()
        torch.testing.assert_close(x.student, expected, rtol=TOLERANCES[dtype].gradient, atol=1e-9)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_statistics_of_whole_rows_give_the_gradient_of_some_columns(divergence: tuple[str, float]) -> None:
    student, teacher = logits(5, 40)
    name, beta = divergence
    x = Rows(student, teacher, Labels(), Terms(kl=1.3), 3.0, "none", name, beta, standardize=True)
    implementation, grad, stats, scale = parts(x)
    whole = implementation.backward(grad, x, stats, scale)
    some = implementation.backward(grad, x._replace(student=student[:, 7:29], teacher=teacher[:, 7:29]), stats, scale)
    torch.testing.assert_close(some, whole[:, 7:29])


def test_contract_compiled_and_opcheck() -> None:
    student, teacher = logits(6, 21)
    target = torch.arange(6, device=DEVICE)
    call = lambda s: run(s, teacher, ("jsd", 0.3), True, labels=Labels(target), terms=Terms(ce=0.1, kl=1.0))  # noqa: E731
    check_contract(call, student)
    check_compiled(call, student)
    for name in ("forward", "jsd"):
        x = Rows(student, teacher, Labels(target), Terms(ce=0.1, kl=0.2), 4.0, "mean", name, 0.3, True)
        opcheck(torch.ops.kdkernels.softmax_kl.default, (*flatten(x), True))
