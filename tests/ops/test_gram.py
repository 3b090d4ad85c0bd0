"""sp_gram and cosine_similarity on every backend: numbers against the definition in fp64, the contract, the edges."""

from __future__ import annotations

import math

import pytest
import torch
from checking import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    TOLERANCES,
    check_close,
    check_compiled,
    check_contract,
    check_op,
    gradients,
    opcheck,
    refused,
)
from torch import Tensor

from kdkernels.ops.gram import LayerPairs, SPOptions, cosine_similarity
from kdkernels.ops.gram import sp_gram as op
from kdkernels.ops.library import flatten

# B = 1 is apart: its Gram matrix is one number, which normalised is 1
SHAPES = [
    ((2, 3), (2, 5)),
    ((7, 13), (7, 130)),
    ((33, 129), (33, 65)),
    ((5, 2, 3, 4), (5, 3, 2, 2)),
    ((64, 1000), (64, 500)),
    ((130, 37), (130, 70)),
]
pytestmark = pytest.mark.usefixtures("backend")


def sp_gram(
    student: Tensor | list[Tensor], teacher: Tensor | list[Tensor], *, scale: float, **options: object
) -> Tensor:
    students, teachers = ([x] if isinstance(x, Tensor) else x for x in (student, teacher))
    weights = [scale * (i + 1) for i in range(len(students))]
    return op(LayerPairs(students, teachers, SPOptions(weights, **{"reduction": "sum", **options})))


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).relu().add(0.01).to(DEVICE, dtype)


@pytest.mark.parametrize(("dtype", "row_norm"), [*((dtype, "l2") for dtype in DTYPES), (torch.float32, "l1")], ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_sp_meets_the_definition(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, row_norm: str) -> None:
    student, teacher = (features(*shape, dtype=dtype) for shape in shapes)
    check_op(lambda s, t: sp_gram(s, t, scale=1.0, row_norm=row_norm), [student], constants=[teacher], upstream=1e3)


@pytest.mark.parametrize("layer_reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_layers_of_different_widths(dtype: torch.dtype, layer_reduction: str) -> None:
    shapes = [(9, 4, 8, 8), (9, 7, 5, 3), (9, 31)]
    students = [features(*shape, dtype=dtype) for shape in shapes]
    teachers = [features(*shape, dtype=dtype) for shape in reversed(shapes)]
    check_op(
        lambda *x: sp_gram(list(x[:3]), list(x[3:]), scale=0.5, layer_reduction=layer_reduction),
        students,
        constants=teachers,
        upstream=1e3,
    )


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded", "batch_last"])
def test_strides(layout: str) -> None:
    views = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(2, 3),
        "sliced": lambda x: x[:, ::2, 1:],
        "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
        "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }
    student, teacher = features(6, 4, 5, 5), features(6, 8, 3, 3)
    check_op(lambda s, t: sp_gram(views[layout](s), views[layout](t), scale=1.0), [student], constants=[teacher])
    leaf = views[layout](student).detach().requires_grad_()
    gradient = gradients(sp_gram(leaf, teacher, scale=1.0), [leaf])[0]
    if layout == "channels_last":
        assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_sums_over_many_columns_keep_their_digits(backend: str) -> None:
    """Grams of non-negative features are nearly equal, and one fp32 sum over all columns loses what they differ by."""
    columns = 16384 if backend == "triton" and DEVICE == "cpu" else 65536  # the interpreter takes its time
    student, teacher = (torch.rand(16, columns, device=DEVICE) for _ in range(2))
    check_op(lambda s, t: sp_gram(s, t, scale=1.0), [student], constants=[teacher], upstream=100.0)


@pytest.mark.parametrize(("batch", "width"), [(12, 4096), (70, 256)])
def test_grams_that_nearly_agree_keep_their_digits(batch: int, width: int) -> None:
    """A teacher a tenth away: what the Grams differ by is a thousandth of them."""
    student = torch.rand(batch, width, device=DEVICE)
    teacher = student + 0.1 * torch.rand(batch, width, device=DEVICE)
    check_op(lambda s, t: sp_gram(s, t, scale=1.0), [student], constants=[teacher], upstream=100.0)


def test_negative_features_and_a_mixed_pair_of_dtypes() -> None:
    student, teacher = torch.randn(12, 40, device=DEVICE), torch.randn(12, 30, device=DEVICE)
    check_op(lambda s, t: sp_gram(s, t, scale=1.0), [student.half()], constants=[teacher], upstream=100.0)


def test_contract() -> None:
    teacher = features(6, 11)
    check_contract(lambda s: sp_gram([s, s * 2], [teacher, teacher], scale=1.0), features(6, 3, 2, 2))


def test_compiled() -> None:
    teacher, other = features(6, 11), features(6, 3, 2, 2)
    check_compiled(lambda s: sp_gram([s, other], [teacher, teacher], scale=1.0), features(6, 3, 2, 2))


def test_opcheck() -> None:
    student, teacher = features(4, 6).requires_grad_(), features(4, 5)
    ops = torch.ops.kdkernels
    options = ([teacher, teacher], [1.0, 2.0], "mean", "none", "l2", 1e-12, False)
    opcheck(ops.sp_gram_traced.default, ([student, student], *options, True))
    opcheck(ops.sp_gram.default, ([student.detach(), teacher], *options, False))
    opcheck(ops.cosine_similarity_traced.default, (student, features(3, 6).requires_grad_(), True))
    grams = torch.stack([features(2, 4, 4), features(2, 4, 4)])
    opcheck(ops.sp_from_grams.default, (grams, *options[1:], True))
    opcheck(ops.grams.default, ([student.detach(), teacher],))
    opcheck(ops.products.default, (student.detach(), features(3, 6)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_parts_make_the_whole(dtype: torch.dtype) -> None:
    """Gram matrices of column shards add up, and their loss is that of the whole; so do products and squared norms."""
    ops = torch.ops.kdkernels
    student, teacher = features(7, 30, dtype=dtype), features(7, 44, dtype=dtype)
    if refused(lambda s, t: sp_gram(s, t, scale=1.0), student, teacher):
        return
    x = LayerPairs([student], [teacher], SPOptions([3.0]))
    whole = ops.sp_gram(*flatten(x), True)
    shards = [ops.grams([student[:, part], teacher[:, part]]) for part in (slice(0, 11), slice(11, None))]
    parts = ops.sp_from_grams((shards[0] + shards[1]).unflatten(0, (2, 1)), *x.options, True)
    for name, a, b in zip(("loss", "gradient matrix"), parts, whole, strict=True):
        check_close(name, a, b, 1e-6)
    a, b = student, features(5, 30, dtype=dtype)
    exact_a, exact_b = a.double(), b.double()
    expected = exact_a @ exact_b.t(), exact_a.square().sum(1), exact_b.square().sum(1)
    for name, actual, exact in zip(("products", "squares", "squares"), ops.products(a, b), expected, strict=True):
        check_close(name, actual, exact, TOLERANCES[dtype].loss)


@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_with_no_pairs_is_zero(batch: int) -> None:
    student = features(batch, 5).requires_grad_()
    loss = sp_gram(student, features(batch, 7), scale=1.0)
    assert loss.item() == 0
    assert (gradients(loss, [student])[0] == 0).all()


@pytest.mark.parametrize("row_norm", ["l2", "l1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_is_like_itself_whatever_is_in_it(dtype: torch.dtype, row_norm: str) -> None:
    """Its Gram matrix is one number, which normalised is 1 to the last bit."""
    for _ in range(5 if INTERPRETED else 30):
        student = features(1, 7, dtype=dtype).requires_grad_()
        if refused(lambda s: sp_gram(s, s.detach(), scale=1.0), student):
            return
        loss = sp_gram(student, features(1, 5, dtype=dtype), scale=1.0, row_norm=row_norm)
        assert loss.item() == 0
        assert (gradients(loss, [student])[0] == 0).all()


def test_tiny_bfloat16_features() -> None:
    """Processors that multiply bf16 take products below 1e-38 for 0: the rows are no zero rows for that."""
    student = (torch.randn(6, 300, device=DEVICE) * 2.0**-66).bfloat16().requires_grad_()
    teacher = torch.randn(6, 300, device=DEVICE).bfloat16()
    gradient = gradients(sp_gram(student, teacher, scale=1.0), [student])[0]
    assert gradient.abs().sum(1).min() > 0


def test_no_features_is_zero() -> None:
    student = torch.zeros(3, 0, device=DEVICE, requires_grad=True)
    loss = sp_gram(student, torch.zeros(3, 0, device=DEVICE), scale=1.0)
    assert loss.item() == 0
    assert gradients(loss, [student])[0].shape == (3, 0)


@pytest.mark.parametrize("published", [False, True])
def test_all_zero_rows(published: bool) -> None:
    student, teacher = features(6, 10, dtype=torch.float64), features(6, 10, dtype=torch.float64)
    student[2] = 0
    teacher[4] = 0
    student = student.float()
    _, (gradient,) = check_op(
        lambda s, t: sp_gram(s, t, scale=1.0, zero_row_grad=published), [student], constants=[teacher.float()]
    )
    assert gradient.isfinite().all()
    # the row's own normalisation: 1 / eps times a number of order one, or nothing at all
    assert (gradient[2].norm() > 1e9) == published
    assert (gradient.norm() > 1e9) == published


@pytest.mark.parametrize("scale", [1e-4, 1e6, 1e10])
def test_small_and_large_features(scale: float) -> None:
    student, teacher = features(6, 50) * scale, features(6, 50) * scale
    check_op(lambda s, t: sp_gram(s, t, scale=1.0), [student], constants=[teacher], upstream=scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_inf_come_out(which: int, bad: float) -> None:
    pair = [features(4, 6), features(4, 6)]
    pair[which][2, 3] = bad
    student = pair[0].requires_grad_()
    loss = sp_gram(student, pair[1], scale=1.0)
    assert loss.isnan()
    assert gradients(loss, [student])[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 3, 2), (48, 16, 100), (31, 65, 129)], ids=str)
def test_cosines_meet_the_definition(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, m, d = shape
    check_op(cosine_similarity, [torch.randn(n, d).to(DEVICE, dtype), torch.randn(m, d).to(DEVICE, dtype)])


def test_cosines_of_views_into_one_tensor() -> None:
    x = torch.randn(12, 7, device=DEVICE)
    check_op(lambda x: cosine_similarity(x.view(4, 3, 7)[:, 1:].reshape(8, 7), x[::3]), [x])
    check_op(lambda x: cosine_similarity(x.t(), x.t().flip(0)), [x])


def test_cosines_contract() -> None:
    other = torch.randn(5, 7, device=DEVICE)
    check_contract(lambda x: cosine_similarity(x, other), torch.randn(4, 7, device=DEVICE))


def test_cosines_compiled() -> None:
    other = torch.randn(5, 7, device=DEVICE)
    check_compiled(lambda x: cosine_similarity(x, other), torch.randn(4, 7, device=DEVICE))


def test_a_zero_row_has_cosine_zero() -> None:
    a, b = torch.randn(3, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    a[1] = 0
    similarity, gradient = check_op(cosine_similarity, [a, b])
    assert (similarity[1] == 0).all()
    assert gradient[0].isfinite().all()


def test_the_cosine_of_a_row_whose_square_overflows_is_right_or_nan() -> None:
    a, b = torch.randn(3, 5, device=DEVICE), torch.randn(4, 5, device=DEVICE)
    similarity = cosine_similarity(torch.cat([a, 1e25 * a]), b)
    expected = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    check_close("rows of usual length", similarity[:3], expected, 1e-6)
    overflown = similarity[3:]
    assert overflown.isnan().all() or (overflown - expected).abs().max() < 1e-6


def test_cosines_of_empty_batches() -> None:
    a = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    assert cosine_similarity(a, torch.ones(3, 4, device=DEVICE)).shape == (0, 3)
