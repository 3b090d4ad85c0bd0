"""The composite op of MLKD's correlation: the same numbers as its parts, in every layout and pair of dtypes."""

from __future__ import annotations

import pytest
import torch
from checking import DEVICE, DTYPES, by_definition, check_close, check_compiled, check_contract, check_op, opcheck
from torch import Tensor

from kdkernels.ops.correlation import CorrelationOptions, ViewRows
from kdkernels.ops.correlation import correlation as op
from kdkernels.ops.gram import cosine_similarity
from kdkernels.ops.softmax_kl import Rows, softmax_kl


def correlation(student: Tensor, teacher: Tensor, *, views: int, temperature: float, reduction: str = "mean") -> Tensor:
    return op(ViewRows(student, teacher, CorrelationOptions(views, temperature, reduction)))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("images", "views", "widths"), [(1, 2, (3, 3)), (5, 3, (7, 4)), (8, 4, (33, 64)), (9, 1, (5, 8))]
)
def test_meets_the_definition(images: int, views: int, widths: tuple[int, int], dtype: torch.dtype) -> None:
    student, teacher = (rows(views * images, width).to(dtype) for width in widths)
    if images == 1:  # one base row: the softmax over it is 1, and the loss 0
        assert correlation(student, teacher, views=views, temperature=0.5).item() == 0
        return
    check_op(
        lambda s, t: correlation(s, t, views=views, temperature=0.5), [student], constants=[teacher], upstream=100.0
    )


def test_equals_its_parts() -> None:
    student, teacher = (rows(12, 6).double() for _ in range(2))

    def cosines(x: Tensor) -> Tensor:
        images = x.unflatten(0, (4, 3))
        return cosine_similarity(images[:, 1:].reshape(8, 6), images[:, 0])

    results = []
    for loss in (
        lambda s: correlation(s, teacher, views=3, temperature=0.3),
        lambda s: softmax_kl(Rows(cosines(s), cosines(teacher), temperature=0.3)),
    ):
        leaf = student.clone().requires_grad_()
        value = loss(leaf)
        (7 * value).backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strides(layout: str) -> None:
    student = {
        "transposed": lambda: rows(5, 12).t(),
        "sliced": lambda: rows(24, 10)[::2, ::2],
    }[layout]()
    check_op(
        lambda s, t: correlation(s, t, views=3, temperature=0.5), [student], constants=[rows(12, 4)], upstream=100.0
    )


def test_a_mixed_pair_of_dtypes() -> None:
    student, teacher = rows(8, 6), rows(8, 5)
    check_op(
        lambda s, t: correlation(s, t, views=2, temperature=0.5), [student.half()], constants=[teacher], upstream=100.0
    )
    leaf = student.requires_grad_()
    value = correlation(leaf, teacher.double(), views=2, temperature=0.5)
    value.backward()
    assert value.dtype == torch.float64
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32
    with by_definition():
        exact = student.detach().double().requires_grad_()
        expected = correlation(exact, teacher.double(), views=2, temperature=0.5)
        expected.backward()
    check_close("loss", value, expected, 1e-6)
    check_close("gradient", leaf.grad, exact.grad, 1e-5)


@pytest.mark.parametrize(("rows_", "views"), [(1, 1), (0, 2)])
def test_nothing_to_compare_is_zero_whatever_is_in_the_row(rows_: int, views: int) -> None:
    student = torch.full((rows_, 4000), 60.0, dtype=torch.float16, device=DEVICE, requires_grad=True)
    loss = correlation(student, student.detach(), views=views, temperature=0.5)
    assert loss.item() == 0
    loss.backward()
    assert (student.grad == 0).all()


def test_contract() -> None:
    teacher = rows(8, 5)
    check_contract(lambda s: correlation(s, teacher, views=2, temperature=0.5), rows(8, 6))


def test_compiled() -> None:
    teacher = rows(8, 5)
    check_compiled(lambda s: correlation(s, teacher, views=2, temperature=0.5), rows(8, 6))


def test_opcheck() -> None:
    for views, reduction in ((3, "mean"), (2, "none"), (1, "sum")):
        options = (rows(6, 5), views, 0.5, reduction)
        opcheck(torch.ops.kdkernels.correlation_traced.default, (rows(6, 4).requires_grad_(), *options, True))
        opcheck(torch.ops.kdkernels.correlation.default, (rows(6, 4), *options, False))
