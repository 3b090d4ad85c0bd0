"""channel_gram and the distances of channel Grams: numbers against the definition in fp64, the contract, the edges."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from checking import DEVICE, DTYPES, check_close, check_compiled, check_contract, check_op, gradients, opcheck
from torch import Tensor

from kdkernels import BackendError, use_backend
from kdkernels.ops.backend import why_not
from kdkernels.ops.channel_gram import GramPairs, channel_gram, reference
from kdkernels.ops.channel_gram import channel_distance as op
from kdkernels.ops.channel_gram.op import KINDS


@pytest.fixture(params=[*KINDS, "ickd in PyTorch"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """ICKD alone has kernels, on CPUs."""
    name, *reference = request.param.split(" ", 1)
    with use_backend("reference" if reference else "auto"):
        yield name


# C, and the pixels: fewer than channels, more, and one of each
SIZES = [(5, (2, 2)), (3, (4, 3)), (1, (3, 3)), (4, (1, 1))]


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def distance(student: list[Tensor], teacher: list[Tensor], kind: str, **options: object) -> Tensor:
    layers = len(student) // 2 if kind == "fsp" else len(student)
    options.setdefault("layer_weights", [1.0] * layers)
    return op(GramPairs(student, teacher, kind=kind, **options))


def layers_of(kind: str, *, channels: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What one pair of layers needs."""
    widths = (channels, channels + 2) if kind == "fsp" else (channels,)
    return [activations(3, c, *size, dtype=dtype) for c in widths]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "size"), SIZES, ids=str)
def test_distance_meets_the_definition(channels: int, size: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    if kind == "ickd" and channels == 1:
        channels = 2  # one channel is a sign, see below
    student, teacher = (layers_of(kind, channels=channels, size=size, dtype=dtype) for _ in range(2))
    n = len(student)
    check_op(lambda *x: distance(list(x[:n]), list(x[n:]), kind), student, constants=teacher, upstream=1e3)


def test_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CACHED", 1)
    student, teacher = ([torch.cat([x, x.flip(0)]) for x in layers_of(kind, channels=5, size=(4, 3))] for _ in range(2))
    n, threads = len(student), torch.get_num_threads()
    parts = reference._parts(*student)
    if DEVICE == "cpu":
        assert [part.start for part in parts] == list(range(0, 6, threads))
    check_op(lambda *x: distance(list(x[:n]), list(x[n:]), kind), student, constants=teacher, upstream=1e3)


@pytest.mark.parametrize(("student", "teacher", "size"), [(3, 7, (2, 2)), (2, 5, (5, 5)), (6, 3, (5, 5))], ids=str)
def test_nst_with_other_channels(student: int, teacher: int, size: tuple[int, int]) -> None:
    check_op(
        lambda s, t: distance([s], [t], "nst"),
        [activations(3, student, *size)],
        constants=[activations(3, teacher, *size)],
    )


@pytest.mark.parametrize("reductions", [("mean", "mean"), ("sum", "none"), ("none", "sum"), ("none", "none")])
def test_several_layers(reductions: tuple[str, str], kind: str) -> None:
    pairs = [layers_of(kind, channels=c, size=size) for c, size in ((4, (5, 5)), (6, (2, 2)))]
    student = [layers[i] for i in range(len(pairs[0])) for layers in pairs]
    teacher = [torch.randn_like(x) for x in student]
    n, options = len(student), dict(zip(("reduction", "layer_reduction"), reductions, strict=True))
    check_op(
        lambda *x: distance(list(x[:n]), list(x[n:]), kind, layer_weights=[3.0, 0.5], **options),
        student,
        constants=teacher,
        upstream=1e2,
    )


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "half"])
def test_strides_and_mixed_dtypes(layout: str, kind: str) -> None:
    views = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda x: x[:, :, ::2, 1:],
        "half": torch.Tensor.half,
    }
    leaves = [views[layout](x).detach() for x in layers_of(kind, channels=4, size=(6, 5))]
    teacher = [torch.randn_like(x, dtype=torch.float32) for x in leaves]
    n = len(leaves)
    _, found = check_op(lambda *x: distance(list(x[:n]), list(x[n:]), kind), leaves, constants=teacher, upstream=1e3)
    if layout == "channels_last":
        assert all(g.is_contiguous(memory_format=torch.channels_last) for g in found)


def test_contract(kind: str) -> None:
    teacher = layers_of(kind, channels=4, size=(3, 3))
    check_contract(lambda s: distance([s, s.repeat(1, 2, 1, 1)[:, :6]][: len(teacher)], teacher, kind), teacher[0] + 1)


def test_compiled() -> None:
    x, other, y = (activations(3, 4, 3, 3) for _ in range(3))
    for kind in KINDS:
        check_compiled(lambda s, kind=kind: distance([s, other], [y, y], kind), x)
    check_compiled(lambda s: channel_gram(s, s), x)


def test_opcheck() -> None:
    x, y = activations(2, 3, 2, 2), activations(2, 3, 2, 2)
    ops, leaf = torch.ops.kdkernels, x.clone().requires_grad_()
    for kind, reductions in zip(KINDS, (("mean", "sum"), ("none", "none"), ("sum", "none")), strict=True):
        layers = [x, y] if kind == "fsp" else [x]
        opcheck(ops.channel_distance.default, (layers, layers, [1.0], kind, *reductions, True))
        leaves = [leaf, y] if kind == "fsp" else [leaf]
        opcheck(ops.channel_distance_traced.default, (leaves, layers, [1.0], kind, *reductions, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram(dtype: torch.dtype) -> None:
    x, y = activations(3, 4, 5, 2, dtype=dtype), activations(3, 6, 10, dtype=dtype)
    for a, b in ((x, y), (x[:, ::2, 1:], y[:, :, :8]), (x.contiguous(memory_format=torch.channels_last), y)):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        exact = [v.detach().double().requires_grad_() for v in (a, b)]
        expected = torch.einsum("bin,bjn->bij", *(v.flatten(2) for v in exact))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            gram = channel_gram(a, b)
        assert gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        upstream = torch.randn_like(expected)
        check_close("gram", gram, expected, 1e-6)
        found = gradients(gram, [a, b], upstream.to(gram.dtype))
        for actual, truth in zip(found, gradients(expected, exact, upstream), strict=True):
            assert actual.dtype == dtype
            check_close("gradient", actual, truth, 1e-6, dtype)


def test_gradcheck(kind: str) -> None:
    for size in ((2, 2), (3, 4)):
        student, teacher = (layers_of(kind, channels=3, size=size, dtype=torch.float64) for _ in range(2))
        leaves = [s.requires_grad_() for s in student]
        assert torch.autograd.gradcheck(lambda *s, t=teacher: distance(list(s), t, kind, reduction="none"), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_networks(dtype: torch.dtype, kind: str) -> None:
    for size in ((2, 2), (5, 5)):
        student = [x.requires_grad_() for x in layers_of(kind, channels=4, size=size, dtype=dtype)]
        loss = distance(student, [s.detach() for s in student], kind)
        assert loss.item() == 0
        assert all((g == 0).all() for g in gradients(loss, student, 1e3))


@pytest.mark.parametrize("channels", [4, 40])
def test_nst_of_a_student_close_to_its_teacher(channels: int) -> None:
    """By products of channels (4) nothing cancels; by those of pixels (40) the rounding of the two Grams is left."""
    teacher = activations(2, channels, 5, 5)
    student = teacher + 1e-3 * activations(2, channels, 5, 5)
    exact = student.double().requires_grad_()
    s, t = (x.flatten(2) / x.flatten(2).norm(dim=2, keepdim=True) for x in (exact, teacher.double()))
    expected = ((s.mT @ s - t.mT @ t) / channels).square().sum((1, 2)).mean()
    loss = distance([student.requires_grad_()], [teacher], "nst")
    check_close("loss", loss, expected, 1e-3)
    check_close("gradient", gradients(loss, [student])[0], gradients(expected, [exact])[0], 1e-3)


def test_ickd_of_one_channel_is_zero() -> None:
    student = activations(3, 1, 4, 4).requires_grad_()
    loss = distance([student], [activations(3, 1, 4, 4)], "ickd")
    assert abs(loss.item()) < 1e-12
    assert (gradients(loss, [student])[0].abs() < 1e-6).all()


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 2)], ids=str)
def test_empty(shape: tuple[int, ...], kind: str) -> None:
    student = [torch.zeros(shape, device=DEVICE, requires_grad=True) for _ in range(2 if kind == "fsp" else 1)]
    loss = distance(student, [s.detach() for s in student], kind)
    assert loss.item() == 0
    assert all(g.shape == shape for g in gradients(loss, student))


def test_dead_channels_and_samples(kind: str) -> None:
    for size in ((2, 2), (4, 4)):
        student, teacher = (layers_of(kind, channels=4, size=size) for _ in range(2))
        student[0][0] = 0
        student[0][1, 2] = 0
        teacher[0][1, 1] = 0
        teacher[0][2] = 0
        n = len(student)
        loss, (gradient, *_) = check_op(
            lambda *x, n=n: distance(list(x[:n]), list(x[n:]), kind), student, constants=teacher
        )
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("which", [0, 1])
def test_nan_comes_out(which: int, kind: str) -> None:
    for size in ((2, 2), (4, 4)):
        both = [layers_of(kind, channels=4, size=size) for _ in range(2)]
        both[which][0][1, 1, 1, 1] = math.nan
        student = [s.requires_grad_() for s in both[0]]
        loss = distance(student, both[1], kind)
        assert loss.isnan()
        gradient = gradients(loss, student)[0]
        assert gradient[1].isnan().any()
        assert gradient[[0, 2]].isfinite().all()


def test_kernels_run_on_the_cpu() -> None:
    x = activations(2, 3, 2, 2).cpu()
    if why_not("channel_gram", "native", x):
        pytest.skip("there are no native kernels here")
    with use_backend("native"):
        native = distance([x], [x.flip(0)], "ickd")
    with use_backend("reference"):
        check_close("loss", distance([x], [x.flip(0)], "ickd"), native, 1e-6)
    with use_backend("triton"), pytest.raises(BackendError, match="no triton implementation of channel_gram"):
        distance([x], [x], "ickd")


@pytest.mark.parametrize("scale", [1e-8, 1e12])
def test_ickd_kernels_at_any_scale(scale: float) -> None:
    """Squares of K, and 1 over them, are beyond floats."""
    student, teacher = (scale * activations(3, 5, 4, 4).cpu() for _ in range(2))
    if why_not("channel_gram", "native", student):
        pytest.skip("there are no native kernels here")
    with use_backend("native"):
        check_op(lambda s, t: distance([s], [t], "ickd"), [student], constants=[teacher], upstream=scale)
