"""nkd, softmax_pearson and multi_level against their definitions, on the reference and on the CPU's kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from checking import DEVICE, DTYPES, check_close, check_compiled, check_contract, check_op, gradients, opcheck
from torch import Tensor

import kdkernels
from kdkernels import dist_loss, mlld_loss, nkd_loss
from kdkernels.ops import backend as backends

if os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("KDKERNELS_TEST_CUDA"):
    pytest.skip("these ops have neither Triton nor CUDA kernels", allow_module_level=True)

Loss = Callable[[Tensor, Tensor], Tensor]
NATIVE = DEVICE == "cpu" and backends.why_not("nkd", "native", torch.ones(2, 2)) is None
LARGE = {"nkd": (7, 1300), "dist": (300, 130), "mlld": (70, 600)}  # several chunks, flushes and stripes


@pytest.fixture(params=["reference", "native"] if NATIVE else ["reference"])
def rows_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kdkernels.use_backend(request.param):
        yield request.param


def labels(rows: int, classes: int) -> Tensor:
    return (3 * torch.arange(rows, device=DEVICE) + 1) % classes


def losses(rows: int, classes: int) -> dict[str, Loss]:
    y = labels(rows, classes)
    return {
        "nkd": lambda s, t: nkd_loss(s, t, y),
        "nkd T": lambda s, t: nkd_loss(s, t, y, temperature=2.5, gamma=0.7, reduction="none"),
        "dist": lambda s, t: dist_loss(s, t),
        "dist T": lambda s, t: dist_loss(s, t, temperature=3.0, beta=2.0, gamma=0.5),
        "mlld": lambda s, t: mlld_loss(s, t),
        "mlld strong": lambda s, t: mlld_loss(s, t, 2 * s, t, temperatures=(1.0, 2.5), strong_temperatures=(1.0,)),
    }


NAMES = list(losses(1, 2))


def logits(*shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("rows_backend")
def test_meets_the_definition(name: str, dtype: torch.dtype) -> None:
    for shape in ((3, 4), (5, 7), (33, 41), LARGE[name.split()[0]]):
        s, t = (logits(*shape).to(dtype) for _ in range(2))
        # an upstream gradient of a loss scaler's size, or fp16 underflows by its nature
        check_op(losses(*shape)[name], [s], constants=[t], upstream=1000.0)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("rows_backend")
def test_strides_and_a_mixed_pair_of_dtypes(name: str, layout: str) -> None:
    make = {
        "transposed": lambda: logits(11, 6).t(),
        "sliced": lambda: logits(12, 22)[::2, ::2],
        "expanded": lambda: logits(1, 11).expand(6, 11),
    }[layout]
    teacher = make().to(torch.bfloat16 if layout == "sliced" else torch.float32)
    student = logits(6, 11) if layout == "expanded" else make()
    check_op(losses(6, 11)[name], [student], constants=[teacher])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("rows_backend")
def test_gradcheck(name: str) -> None:
    s, t = (logits(4, 5).double() for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: losses(4, 5)[name](x, t), s.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("rows_backend")
def test_contract(name: str) -> None:
    teacher = logits(6, 9)
    check_contract(lambda s: losses(6, 9)[name](s, teacher), logits(6, 9))


@pytest.mark.parametrize("name", ["nkd", "dist", "mlld strong"])
def test_compiled(name: str) -> None:
    with torch.inference_mode():
        teacher = logits(6, 9)
    check_compiled(lambda s: losses(6, 9)[name](s, teacher), logits(6, 9), "aot_eager")


def test_opcheck() -> None:
    s, t, ops = logits(4, 5), logits(4, 5), torch.ops.kdkernels
    arguments = {
        "nkd": (t, labels(4, 5), 2.0, 1.5, -100, "none"),
        "softmax_pearson": (t, 2.0, 1.0, 1.0, 1e-8),
        "multi_level": (t, [1.0, 2.0], [1.0, 0.5], 1.0, 1.0, 1.0, 0.5),
    }
    for name, options in arguments.items():
        opcheck(getattr(ops, f"{name}_traced").default, (s.requires_grad_(), *options, True))
        opcheck(getattr(ops, name).default, (s.detach(), *options, False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("rows_backend")
def test_few_rows_and_few_classes(name: str) -> None:
    """None, one; and one class, whose probability is 1 whatever its logit."""
    for shape in ((0, 5), (1, 5), (3, 1), (1, 1)):
        loss, (gradient,) = check_op(losses(*shape)[name], [logits(*shape)], constants=[logits(*shape)])
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("rows_backend")
def test_identical_networks(dtype: torch.dtype) -> None:
    s = logits(9, 17).to(dtype)
    y = labels(9, 17)
    zero = 1e-6 if dtype == torch.float32 else 1e-14
    for loss in (losses(9, 17)["mlld"], lambda s, t: mlld_loss(s, t, s, t)):
        leaf = s.clone().requires_grad_()
        value = loss(leaf, s)
        assert value.abs() <= zero
        assert (gradients(value, [leaf])[0] == 0).all()
    leaf = s.clone().requires_grad_()
    value = dist_loss(leaf, s)
    assert 0 <= value < 1e-5  # eps beside the norms
    assert gradients(value, [leaf])[0].abs().max() < 1e-5
    # NKD is a cross entropy: what is left is the teacher's own entropy, with no gradient but the target's
    value = nkd_loss(leaf, s, y)
    p = s.softmax(1).gather(1, y[:, None])
    q = s.scatter(1, y[:, None], -torch.inf).softmax(1)
    expected = -(p * p.log()).mean() + 1.5 * torch.special.entr(q).sum(1).mean()
    check_close("nkd", value, expected, 1e-6)
    target_only = (p * (s.softmax(1) - torch.zeros_like(s).scatter(1, y[:, None], 1))) / 9
    check_close("gradient", gradients(value, [leaf])[0], target_only, 2e-6)


@pytest.mark.parametrize("which", ["rows", "columns", "student", "flat teacher"])
@pytest.mark.usefixtures("rows_backend")
def test_dist_of_constants(which: str) -> None:
    """A constant row or column has r = 0; beside the eps of 1e-8 its gradient is large, and exact."""
    s, t = logits(6, 10), logits(6, 10)
    if which == "rows":
        s[2], t[3] = 0.5, -1.0
    elif which == "columns":
        s = s[:1].expand(6, 10).clone()
    elif which == "student":
        s = torch.full_like(s, 0.7)
    else:
        s, t = 4 * s, 1e-2 * t
    loss, _ = check_op(dist_loss, [s], constants=[t])
    assert which != "student" or loss == 2


@pytest.mark.usefixtures("rows_backend")
def test_dist_of_a_constant_teacher_has_no_gradient() -> None:
    s = logits(6, 10).requires_grad_()
    loss = dist_loss(s, torch.full_like(s, 0.7))
    assert loss == 2
    assert (gradients(loss, [s])[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("rows_backend")
def test_huge_logits(name: str, dtype: torch.dtype) -> None:
    s, t = (logits(5, 8, scale=1e4).to(dtype) for _ in range(2))
    loss, (gradient,) = check_op(losses(5, 8)[name], [s], constants=[t])
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("rows_backend")
def test_nan_does_not_hide(name: str, value: float) -> None:
    for at in ((1, 4), (0, 3)):  # the target of row 1, and no target
        for of_student in (True, False):
            s, t = logits(4, 5), logits(4, 5)
            (s if of_student else t)[at] = value
            s.requires_grad_()
            loss = losses(4, 5)[name](s, t)
            assert loss.sum().isnan()
            assert gradients(loss.sum(), [s])[0].isnan().any()


@pytest.mark.usefixtures("rows_backend")
def test_nkd_ignores_rows_and_names_labels() -> None:
    s, t, y = logits(5, 7), logits(5, 7), labels(5, 7)
    y[1] = y[4] = -100
    s[1], t[4] = float("nan"), float("nan")
    kept = [0, 2, 3]
    for reduction in ("mean", "sum", "none"):
        loss, (gradient,) = check_op(lambda s, t, r=reduction: nkd_loss(s, t, y, reduction=r), [s], constants=[t])
        expected = nkd_loss(s[kept], t[kept], y[kept], reduction=reduction)
        torch.testing.assert_close(loss[kept] if reduction == "none" else loss, expected)
        assert (gradient[[1, 4]] == 0).all()
    nothing = nkd_loss(s.requires_grad_(), t, torch.full_like(y, 9), ignore_index=9)
    assert nothing == 0
    assert (gradients(nothing, [s])[0] == 0).all()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"target has label 7; valid are 0..6, and -100 to ignore"):
            nkd_loss(s, t, torch.full_like(y, 7))


@pytest.mark.parametrize("name", ["nkd", "nkd T", "dist", "mlld"])
@pytest.mark.usefixtures("rows_backend")
def test_close_to_the_teacher_digits_are_kept(name: str) -> None:
    t = logits(16, 50)
    s = t + 1e-3 * logits(16, 50)
    exact = s.double().requires_grad_()
    expected = losses(16, 50)[name](exact, t.double())
    leaf = s.requires_grad_()
    loss = losses(16, 50)[name](leaf, t)
    check_close("loss", loss, expected, 2e-5)
    check_close("gradient", gradients(loss.sum(), [leaf])[0], gradients(expected.sum(), [exact])[0], 1e-3)
