"""MLKD's terms: the correlation against its definition, the others against plain loops, and the edges."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checking import (
    DEVICE,
    DTYPES,
    check_compiled,
    check_contract,
    check_op,
    gradients,
)
from torch import Tensor

from kdkernels import MLKDLoss, alignment_loss, correlation_loss, mlkd_loss, supervised_contrastive_loss

pytestmark = pytest.mark.usefixtures("backend")


def rows(n: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64).to(DEVICE, dtype)


def loop_supervised(student: Tensor, teacher: Tensor, target: Tensor, tau: float) -> Tensor:
    w = [x / x.norm() for x in (*student.cpu(), *teacher.cpu())]
    labels = target.tolist() * 2
    loss = torch.zeros((), dtype=student.dtype)
    for i in range(len(w)):
        top = 1 / tau  # the largest logit of the row is its own entry, which the denominator leaves out
        denominator = sum(torch.exp(w[i] @ w[j] / tau - top) for j in range(len(w)) if j != i) + 1e-7
        positives = [j for j in range(len(w)) if j != i and labels[j] == labels[i]]
        terms = [w[i] @ w[j] / tau - top - denominator.log() for j in positives]
        loss = loss - sum(terms) / len(terms) / len(w)
    return loss


@pytest.mark.parametrize("tau", [0.5, 0.1])
@pytest.mark.parametrize("images", [1, 2, 7])
@pytest.mark.parametrize("views", [1, 2, 3, 4])
def test_correlation_of_few_images(views: int, images: int, tau: float) -> None:
    student, teacher = rows(views * images, 6).requires_grad_(), rows(views * images, 9)
    compared = images - (views == 1)  # one view's rows are compared with the others
    if compared > 1:
        check_op(lambda s, t: correlation_loss(s, t, views=views, temperature=tau), [student], constants=[teacher])
        return
    loss = correlation_loss(student, teacher, views=views, temperature=tau)
    assert loss.item() == 0  # one class or none in each softmax
    assert (gradients(loss, [student])[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("views", [1, 2, 4])
def test_correlation_in_every_dtype(views: int, dtype: torch.dtype) -> None:
    check_op(lambda s, t: correlation_loss(s, t, views=views), [rows(48, 33, dtype)], constants=[rows(48, 65, dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_supervised_and_alignment_in_every_dtype(dtype: torch.dtype) -> None:
    target = torch.arange(24, device=DEVICE) % 5
    student, teacher = rows(24, 16, dtype), rows(24, 16, dtype)
    check_op(lambda s, t: supervised_contrastive_loss(s, t, target), [student, teacher])
    check_op(alignment_loss, [student], constants=[teacher])


@pytest.mark.parametrize("tau", [0.07, 0.5])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_supervised_equals_a_loop(n: int, tau: float) -> None:
    student, teacher = rows(n, 5).requires_grad_(), rows(n, 5).requires_grad_()
    target = torch.tensor([0, 2, 1, 0, 0, 1, 2, 7, 2][:n], device=DEVICE)
    loss = supervised_contrastive_loss(student, teacher, target, temperature=tau)
    expected = loop_supervised(student, teacher, target, tau)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-11, atol=1e-12)
    for a, e in zip(
        gradients(loss, [student, teacher], 4.0), gradients(expected, [student, teacher], 4.0), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-11)


def test_supervised_is_stable_at_low_temperature() -> None:
    """Cosines of 1 at 0.07 are logits of 14, at 0.005 of 200: e^200 is no fp32 number."""
    student = F.one_hot(torch.arange(8) % 4, 16).float().to(DEVICE).requires_grad_()
    teacher = (student.detach() + 1e-3 * torch.randn(8, 16, device=DEVICE)).requires_grad_()
    for tau in (0.07, 0.005):
        loss = supervised_contrastive_loss(student, teacher, torch.arange(8, device=DEVICE) % 4, temperature=tau)
        expected = loop_supervised(student.double(), teacher.double(), torch.arange(8) % 4, tau)
        assert loss.item() == pytest.approx(expected.item(), rel=2e-4 if tau < 0.01 else 1e-5)
        assert all(g.isfinite().all() for g in gradients(loss, [student, teacher]))


def test_gradcheck() -> None:
    student, teacher = rows(8, 5).requires_grad_(), rows(8, 5).requires_grad_()
    target = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2], device=DEVICE)
    for views in (1, 2, 4):
        assert torch.autograd.gradcheck(lambda s, v=views: correlation_loss(s, teacher, views=v), student)
    assert torch.autograd.gradcheck(lambda s: alignment_loss(s, teacher), student)
    assert torch.autograd.gradcheck(
        lambda s, t: supervised_contrastive_loss(s, t, target, temperature=0.3), (student, teacher)
    )


def test_alignment_equals_its_formula() -> None:
    student, teacher = rows(7, 5), rows(7, 5)
    plain = 2 - 2 * sum(s @ t / (s.norm() * t.norm()) for s, t in zip(student, teacher, strict=True)) / 7
    torch.testing.assert_close(alignment_loss(student, teacher), plain)
    assert alignment_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-14)
    assert alignment_loss(-teacher, teacher).item() == pytest.approx(4)


TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "correlation": lambda s, t: correlation_loss(s, t, views=2),
    "one view": lambda s, t: correlation_loss(s, t, views=1),
    "supervised": lambda s, t: supervised_contrastive_loss(s, t, torch.zeros(len(s), dtype=torch.int64, device=DEVICE)),
    "alignment": alignment_loss,
}


@pytest.mark.parametrize("name", list(TERMS))
def test_zero_rows_and_empty_batches(name: str) -> None:
    student, teacher = rows(6, 5, torch.float32), rows(6, 5, torch.float32)
    student[0] = student[3] = teacher[1] = teacher[3] = 0
    student.requires_grad_()
    loss = TERMS[name](student, teacher)
    assert loss.isfinite()
    gradient = gradients(loss, [student])[0]
    assert gradient.isfinite().all()
    assert gradient.norm() > 0

    empty = rows(0, 5, torch.float16).requires_grad_()
    loss = TERMS[name](empty, rows(0, 5, torch.float16))
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    assert gradients(loss, [empty])[0].shape == (0, 5)


@pytest.mark.parametrize("name", list(TERMS))
def test_one_image(name: str) -> None:
    n = 2 if name == "correlation" else 1
    student = rows(n, 5, torch.float16).requires_grad_()
    loss = TERMS[name](student, rows(n, 5, torch.float16))
    assert loss.dtype == torch.float32
    if name in ("correlation", "one view"):
        assert loss.item() == 0
        assert (gradients(loss, [student])[0] == 0).all()


@pytest.mark.parametrize("name", list(TERMS))
def test_nan_comes_out(name: str) -> None:
    student = rows(6, 5, torch.float32)
    student[2, 1] = math.nan
    assert TERMS[name](student, rows(6, 5, torch.float32)).isnan()
    if name == "one view":
        assert TERMS[name](student[2:3], rows(1, 5, torch.float32)).isnan()


def test_contract_and_compile() -> None:
    teacher, x = rows(8, 6, torch.float32), rows(8, 6, torch.float32)
    for views in (1, 4):
        check_contract(lambda s, v=views: correlation_loss(s, teacher, views=v), x)
        check_compiled(lambda s, v=views: correlation_loss(s, teacher, views=v), x)
    target = torch.arange(8, device=DEVICE) % 3
    check_compiled(lambda s: supervised_contrastive_loss(s, teacher, target), x, "aot_eager")


def test_autocast_changes_nothing() -> None:
    target = torch.arange(8, device=DEVICE) % 3
    for dtype in (torch.float32, torch.float16):
        student, teacher = rows(8, 6, dtype).requires_grad_(), rows(8, 6, dtype)
        for term in (
            lambda s, t: mlkd_loss(s, t, target, views=2),
            lambda s, t: supervised_contrastive_loss(s, t, target),
            alignment_loss,
        ):
            loss = term(student, teacher)
            with torch.autocast(DEVICE, torch.bfloat16):
                cast = term(student, teacher)
            assert torch.equal(cast, loss)
            assert torch.equal(gradients(cast, [student])[0], gradients(loss, [student])[0])


def weights(correlation: float, supervised: float, alignment: float) -> dict[str, float]:
    return {
        "correlation_weight": correlation,
        "supervised_weight": supervised,
        "alignment_weight": alignment,
    }


def test_the_three_together() -> None:
    student, teacher = rows(12, 6).requires_grad_(), rows(12, 6)
    labels = torch.tensor([0, 1, 0, 2], device=DEVICE)
    parts = [
        correlation_loss(student, teacher, views=3),
        supervised_contrastive_loss(student, teacher, labels.repeat_interleave(3)),
        alignment_loss(student, teacher),
    ]
    expected = 50 * parts[0] + parts[1] + 20 * parts[2]
    torch.testing.assert_close(mlkd_loss(student, teacher, labels, views=3), expected)
    torch.testing.assert_close(mlkd_loss(student, teacher, labels.repeat_interleave(3), views=3), expected)
    label_free = mlkd_loss(student, teacher, views=3)
    torch.testing.assert_close(label_free, 50 * parts[0] + 20 * parts[2])
    halves = mlkd_loss([student] * 3, [teacher] * 3, labels, views=3, **weights(20, 0.5, 10))
    torch.testing.assert_close(halves, 20 * parts[0] + parts[1] / 2 + 10 * parts[2])
    assert mlkd_loss(student, teacher, labels, views=3, **weights(0, 0, 0)).item() == 0


def test_module_owns_four_heads() -> None:
    loss = MLKDLoss(6, 10, views=2).to(DEVICE)
    count = sum(p.numel() for p in loss.parameters())
    g_a = 6 * 160 + 160 + 2 * 160 + 160 * 10 + 10
    g_c = 6 * 6 + 6 + 2 * 6 + 6 * 6 + 6
    assert count == g_a + g_c + (6 * 128 + 128) + (10 * 128 + 128)
    student, teacher = rows(8, 6, torch.float32).requires_grad_(), rows(8, 10, torch.float32).requires_grad_()
    target = torch.arange(4, device=DEVICE) % 2
    value = loss(student, teacher, target)
    value.backward()
    assert teacher.grad is None
    assert student.grad.norm() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
    assert loss.e_t.weight.grad.norm() > 0  # the teacher's embedding trains
    heads = [loss.g_a(student), loss.g_c(student), loss.e_s(student)]
    others = [teacher.detach(), teacher.detach(), loss.e_t(teacher)]
    torch.testing.assert_close(mlkd_loss(heads, others, target, views=2), value)

    free = MLKDLoss(6, 10, views=2, supervised_weight=0).to(DEVICE)
    assert free.e_s is None
    assert free.e_t is None
    free(student, teacher).backward()
    assert all(p.grad is not None for p in free.parameters())


def test_options_are_those_of_the_function() -> None:
    options = {"views": 2, **weights(3.0, 0.5, 2.0), "temperature": 0.3, "supervised_temperature": 0.2}
    loss = MLKDLoss(6, 10, **options, reduction="sum").to(DEVICE, torch.float64).eval()
    assert loss.options == {**options, "reduction": "sum"}
    student, teacher, target = rows(8, 6), rows(8, 10), torch.arange(4, device=DEVICE) % 2
    heads = [loss.g_a(student), loss.g_c(student), loss.e_s(student)], [teacher, teacher, loss.e_t(teacher)]
    torch.testing.assert_close(loss(student, teacher, target), mlkd_loss(*heads, target, **loss.options))


def test_both_ways_to_import() -> None:
    import kdkernels.mlkd_loss

    assert callable(kdkernels.mlkd_loss)
    assert sys.modules["kdkernels.mlkd_loss"].mlkd_loss is mlkd_loss
