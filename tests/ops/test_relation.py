"""relation on every backend that has it: numbers against the definition in fp64, the contract, the edges."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from checking import (
    DEVICE,
    DTYPES,
    backends_under_test,
    check_close,
    check_compiled,
    check_contract,
    check_op,
    gradients,
    opcheck,
)
from torch import Tensor

import kdkernels
from kdkernels.ops import backend as backends
from kdkernels.ops.checks import compute_dtype
from kdkernels.ops.relation import CC, IRG, PKT, RKD, relation
from kdkernels.ops.relation.op import DISTANCES, Options, loss_op, measures_op, pack, unpack

PROBE = torch.ones(2, 2, device=DEVICE)
BACKENDS = [b for b in backends_under_test() if backends.why_not("relation", b, PROBE) is None]
OPTIONS: dict[str, Options] = {
    "rkd": RKD(25.0, 50.0, 1e-12, False),
    "rkd distances": RKD(3.0, 0.0, 1e-12, True),
    "rkd angles": RKD(0.0, 2.0, 1e-12, False),
    "irg": IRG(1e-12, True),
    "irg roots": IRG(1e-12, False),
    "pkt": PKT(1e-7),
    "cc": CC(True, 0.4, 2),
    "cc bilinear": CC(True, gaussian=False),
    "cc products": CC(False, 0.7, 5),
}
SHAPES = [((3, 4), (3, 5)), ((7, 2, 3, 4), (7, 13)), ((34, 129), (34, 1100))]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kdkernels.use_backend(request.param):
        yield request.param


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64)
    # rows of length 1 or so, as powers of products want them
    return (x / math.prod(shape[1:]) ** 0.5).to(DEVICE, dtype)


def run(student: Tensor, teacher: Tensor, name: str = "rkd", reduction: str = "mean") -> Tensor:
    return relation(student, teacher.detach(), OPTIONS[name], reduction)


def check(student: Tensor, teacher: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """check_op, where fp16 holds the gradients: RKD's mean, and the others' sum."""
    reduction = "mean" if name.startswith("rkd") else "sum"
    loss, (gradient,) = check_op(lambda s, t: run(s, t, name, reduction), [student], constants=[teacher], upstream=10.0)
    return loss, gradient


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_meets_the_definition(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, name: str) -> None:
    check(*(features(*shape, dtype=dtype) for shape in shapes), name)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_the_mean_is_the_sum_over_pairs_or_triples(name: str) -> None:
    student, teacher = features(5, 4, dtype=torch.float64), features(5, 6, dtype=torch.float64)
    sums = check_op(lambda s, t: run(s, t, name, "sum"), [student], constants=[teacher])
    means = check_op(lambda s, t: run(s, t, name), [student], constants=[teacher])
    if name != "rkd":
        count = 125 if name == "rkd angles" else 25
        check_close("loss", count * means[0], sums[0], 1e-12)
        check_close("gradient", count * means[1][0], sums[1][0], 1e-12)


@pytest.mark.parametrize("name", ["rkd", "pkt"])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_strides(layout: str, name: str) -> None:
    views = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(2, 3),
        "sliced": lambda x: x[:, ::2, 1:],
        "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    }
    student, teacher = features(6, 4, 5, 5), features(6, 8, 3, 3)
    check_op(lambda s, t: run(views[layout](s), views[layout](t), name), [student], constants=[teacher])
    leaf = views[layout](student).detach().requires_grad_()
    gradient = gradients(run(leaf, teacher, name), [leaf])[0]
    if layout == "channels_last":
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["rkd", "irg", "irg roots"])
def test_near_duplicates_on_an_offset_keep_their_digits(name: str) -> None:
    """Rows around 100 that lie 1e-2 apart, pairs of them 1e-4 of that; two are equal."""
    rows = [100 + 1e-2 * torch.randn(12, 40, dtype=torch.float64) for _ in range(2)]
    for x in rows:
        x[1] = x[0] + 1e-6 * torch.randn(40, dtype=torch.float64)
        x[5] = x[4]
    student, teacher = (x.to(DEVICE, torch.float32) for x in rows)
    assert 0 < (student[1] - student[0]).norm() < 2e-3 * (student[2] - student[0]).norm()
    check(student, teacher, name)


def test_small_differences_of_a_wide_cloud() -> None:
    """The pair's own angles: what 1e-4 of a radius would lose in fp32."""
    student, teacher = features(8, 30), features(8, 30)
    student[1] = student[0] + 1e-4 * features(30, 1)[:, 0]
    check(student, teacher, "rkd angles")


@pytest.mark.parametrize("name", ["rkd", "irg roots"])
def test_equal_rows_get_finite_gradients(name: str) -> None:
    student, teacher = features(6, 5), features(6, 7)
    student[3] = student[2]
    _, gradient = check(student, teacher, name)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0
    same = student[:1].expand(4, -1).clone()
    loss, gradient = check(same, teacher[:4], name)
    assert loss > 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_identical_networks_give_zero(dtype: torch.dtype, name: str) -> None:
    x = features(9, 11, dtype=dtype)
    x[4] = x[3]
    x[5] = 0
    student = x.clone().requires_grad_()
    loss = run(student, x, name)
    assert abs(loss.item()) < 1e-15  # PKT's is a sum of logarithms of 1
    gradient = gradients(loss, [student])[0]
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1e-6 if name == "pkt" else (gradient == 0).all()


@pytest.mark.parametrize("name", ["pkt", "cc"])
def test_zero_rows(name: str) -> None:
    student, teacher = features(6, 5), features(6, 7)
    student[2] = 0
    teacher[4] = 0
    loss, gradient = check(student, teacher, name)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (3, 0)], ids=str)
def test_nothing_to_compare(shape: tuple[int, int], name: str) -> None:
    student = features(*shape).requires_grad_() if shape[1] else torch.zeros(shape, device=DEVICE, requires_grad=True)
    loss = run(student, student.detach().clone(), name)
    assert loss.item() == 0
    gradient = gradients(loss, [student])[0]
    assert gradient.shape == shape
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", list(OPTIONS))
def test_two_rows(name: str) -> None:
    """Two rows have one distance, which is its own mean and maximum, and no angle: RKD and IRG are 0."""
    student, teacher = features(2, 5).requires_grad_(), features(2, 7)
    loss = run(student, teacher, name)
    gradient = gradients(loss, [student])[0]
    if pack(OPTIONS[name])[0] in DISTANCES:
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert gradient.abs().max() < 1e-12
    else:
        check(student, teacher, name)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_nan_and_inf_come_out(name: str, which: int, bad: float) -> None:
    pair = [features(4, 6), features(4, 6)]
    pair[which][2, 3] = bad
    student = pair[0].requires_grad_()
    loss = run(student, pair[1], name)
    assert not loss.isfinite()
    assert not gradients(loss, [student])[0].isfinite().all()


@pytest.mark.parametrize("name", ["rkd", "irg", "pkt", "cc"])
def test_contract_and_compiled(name: str) -> None:
    teacher = features(6, 11)
    check_contract(lambda s: run(s, teacher, name), features(6, 3, 2, 2))
    check_compiled(lambda s: run(s, teacher, name), features(6, 3, 2, 2))


@pytest.mark.parametrize("name", ["rkd", "cc"])
def test_opcheck(name: str) -> None:
    student, teacher = features(4, 6).requires_grad_(), features(4, 5)
    ops, numbers = torch.ops.kdkernels, pack(OPTIONS[name])
    opcheck(ops.relation_traced.default, (student, teacher, *numbers, "mean", True))
    measures = ops.relation_measures([student.detach(), teacher], name)
    opcheck(ops.relation_measures.default, ([student.detach(), teacher], name))
    opcheck(ops.relation_loss.default, (measures, *numbers, "sum", False))


@pytest.mark.parametrize("name", list(OPTIONS))
def test_the_parts_make_the_whole(name: str) -> None:
    """Measures of column shards add up, and their loss is that of the whole."""
    student, teacher = features(7, 30), features(7, 44)
    packed = pack(OPTIONS[name])
    assert unpack(*packed) == OPTIONS[name]
    cuts = slice(0, 11), slice(11, None)
    measures = sum(measures_op([student[:, part], teacher[:, part]], packed[0]) for part in cuts)
    loss, _ = loss_op(measures, *packed, "mean", True)
    check_close("loss", loss.to(compute_dtype(student)), run(student, teacher, name), 1e-5)


def test_angles_in_tiles_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.ops.relation import reference

    student, teacher = features(9, 6, dtype=torch.float64).requires_grad_(), features(9, 5, dtype=torch.float64)
    with kdkernels.use_backend("reference"):
        whole = run(student, teacher)
        monkeypatch.setitem(reference.TILES, DEVICE, 200)
        tiled = run(student, teacher)
    check_close("loss", tiled, whole, 1e-14)
    check_close("gradient", gradients(tiled, [student])[0], gradients(whole, [student])[0], 1e-13)
