"""rkd_loss, pkt_loss, cc_loss, irg_loss, gram and cosine_similarity: their peers' figures, options, modules, errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import DEVICE, DTYPES, backends_under_test, check_close, check_compiled, check_contract, check_op, wave
from torch import Tensor, nn

import kdkernels
from kdkernels import cc_loss, cosine_similarity, gram, irg_loss, neighbour_correlation_loss, pkt_loss, rkd_loss
from kdkernels.ops.backend import why_not

Loss = Callable[[Tensor, Tensor], Tensor]
BACKENDS = [b for b in backends_under_test() if why_not("relation", b, torch.ones(2, 2, device=DEVICE)) is None]
PEERS: dict[str, Callable[..., Loss]] = {
    "rkd": lambda a: partial(rkd_loss, distance_weight=a("w_d", 25), angle_weight=a("w_a", 50)),
    "rkd_mdistiller": lambda a: partial(rkd_loss, squared=a("squared"), eps=a("eps")),
    "rkd_squared": lambda a: partial(rkd_loss, squared=a("squared")),
    "rkd_torchdistill_sum": lambda a: partial(
        rkd_loss, distance_weight=a("dist_factor"), angle_weight=a("angle_factor"), reduction="sum"
    ),
    "pkt": lambda a: partial(pkt_loss, eps=a("eps")),
    "cc_zoo": lambda a: partial(cc_loss, gamma=a("gamma"), order=a("P_order")),
    "cc_torchdistill_gaussian_sum": lambda a: root(
        partial(cc_loss, gamma=a("gamma"), order=a("max_p"), normalize=False, reduction="sum")
    ),
    "cc_torchdistill_bilinear": lambda a: root(partial(cc_loss, kernel="bilinear", normalize=False), mean=True),
    "irg_edge": lambda a: partial(irg_loss, squared=a("squared"), eps=a("eps")),
    "correlation": lambda a: neighbour_correlation_loss,
}
SAME = {
    "rkd_distance": "rkd",
    "rkd_angle": "rkd",
    "pkt_mdistiller": "pkt",
    "pkt_zoo": "pkt",
    "irg_edge_root": "irg_edge",
}
FILE = json.loads((Path(__file__).parent / "golden" / "relational.json").read_text())
ROWS = {row["name"]: row for row in FILE if SAME.get(kind := re.split(r"\[", row["name"])[0], kind) in PEERS}


def partial(loss: Callable[..., Tensor], **options: Any) -> Loss:
    return lambda s, t: loss(s, t, **options)


def root(loss: Loss, mean: bool = False) -> Loss:
    """torchdistill's: a Frobenius norm, over B^2 in one of them; the mean's root is the norm over B."""
    return lambda s, t: loss(s, t).sqrt() / (len(s) if mean else 1)


def test_every_kind_of_row_is_there() -> None:
    kinds = {re.split(r"\[", name)[0] for name in ROWS}
    assert kinds == set(PEERS) | set(SAME)
    assert len(ROWS) == 4 * 14 + 2 + 8  # four inputs each, cc_zoo with three options; correlation two


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("name", list(ROWS))
def test_golden_row(name: str, backend_name: str, dtype: torch.dtype) -> None:
    row, kind = ROWS[name], re.split(r"\[", name)[0]
    arguments = row.get("args") or {}
    loss_fn = PEERS[SAME.get(kind, kind)](lambda key, default=None: arguments.get(key, default))
    student, teacher = (
        wave(row[who]["shape"], row[who]["seed"], row[who]["scale"], torch.float64) for who in ("student", "teacher")
    )
    student, teacher = (
        (x.clamp(min=0) if row[who]["clamp"] else x).to(dtype)
        for x, who in ((student, "student"), (teacher, "teacher"))
    )
    student.requires_grad_()
    with kdkernels.use_backend(backend_name):
        loss = loss_fn(student, teacher)
        gradient = torch.autograd.grad(loss, student)[0].double()
    relative = 1e-9 if dtype == torch.float64 else 1e-5
    norm = row["grad_norm"][0]
    along = wave(gradient.shape, 0.5, 1)
    assert loss.item() == pytest.approx(row["loss"], rel=relative, abs=1e-12)
    assert gradient.norm().item() == pytest.approx(norm, rel=relative, abs=1e-12)
    slack = 1e-12 + relative * norm * along.norm().item()
    assert (gradient * along).sum().item() == pytest.approx(row["grad_dot_wave"][0], abs=slack)


# ---- options, modules, errors

LOSSES: dict[str, tuple[Callable[..., Tensor], type[nn.Module], dict[str, Any]]] = {
    "rkd": (rkd_loss, kdkernels.RKDLoss, {"distance_weight": 1.0, "angle_weight": 2.0, "squared": True, "eps": 1e-3}),
    "pkt": (pkt_loss, kdkernels.PKTLoss, {"eps": 1e-3}),
    "cc": (cc_loss, kdkernels.CCLoss, {"gamma": 0.7, "order": 3, "normalize": False}),
    "irg": (irg_loss, kdkernels.IRGLoss, {"squared": False, "eps": 1e-3}),
}
NAMES = list(LOSSES)


def pair(batch: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4, dtype=torch.float64, device=DEVICE), torch.randn(
        batch, 7, dtype=torch.float64, device=DEVICE
    )


@pytest.mark.parametrize("name", NAMES)
def test_modules_take_the_functions_options(name: str) -> None:
    function, module, options = LOSSES[name]
    s, t = pair()
    assert torch.equal(module()(s, t), function(s, t))
    for reduction in ("mean", "sum"):
        made = module(**options, reduction=reduction)
        assert torch.equal(made(s, t), function(s, t, **options, reduction=reduction))
        assert not torch.isclose(made(s, t), function(s, t, reduction=reduction))
        for option, value in options.items():
            assert f"{option}={value}" in repr(made)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_the_teacher_is_a_constant(name: str) -> None:
    function, (s, t) = LOSSES[name][0], pair(4)
    assert torch.autograd.gradcheck(lambda x: 10 * function(x, t), s.requires_grad_())
    t.requires_grad_()
    function(s, t).backward()
    assert t.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_errors_name_what_was_given(name: str) -> None:
    function, module, options = LOSSES[name]
    s, t = pair()
    with pytest.raises(
        ValueError, match=rf"{name}_loss: student and teacher must be \(B, ...\).*\(5, 4\) and \(4, 7\)"
    ):
        function(s, t[:4])
    with pytest.raises(ValueError, match=r"\(B, ...\)"):
        function(s[0], t[0])
    with pytest.raises(TypeError, match="int64"):
        function(s.long(), t)
    for make in (lambda **o: function(s, t, **o), module):
        with pytest.raises(ValueError, match="no value of a single sample"):
            make(reduction="none")
        wrong = {"eps": 0.0, "gamma": -1.0, "distance_weight": -1.0}
        for option in wrong.keys() & options.keys():
            with pytest.raises(ValueError, match=rf"{option} must be"):
                make(**{option: wrong[option]})
        for option in {"squared", "normalize"} & options.keys():
            with pytest.raises(TypeError, match=rf"{option} must be True or False, got 1"):
                make(**{option: 1})
    if name == "cc":
        for order in (-1, 1.0, True):
            with pytest.raises(ValueError, match="order must be an int"):
                cc_loss(s, t, order=order)
        with pytest.raises(ValueError, match="'gaussian', 'bilinear'"):
            cc_loss(s, t, kernel="rbf")


def test_no_tensor_of_all_triples_or_differences() -> None:
    """RKD of 96 rows of 300 numbers: B^3 fp64 numbers are 7 MB, B^2 D fp32 numbers 11 MB."""
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[name-defined]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
            return out

    s, t = torch.randn(96, 300, requires_grad=True), torch.randn(96, 300)
    with kdkernels.use_backend("reference"), Sizes():
        rkd_loss(s, t).backward()
    assert max(sizes) <= 2**16 + 96**2


# ---- gram, cosine_similarity


@pytest.mark.usefixtures("backend")
class TestGram:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_meets_the_definition(self, dtype: torch.dtype) -> None:
        x, y = (torch.randn(n, 3, 4, 5, device=DEVICE).to(dtype) for n in (7, 5))
        check_op(gram, [x])
        check_op(gram, [x, y])
        check_op(cosine_similarity, [x])
        check_op(cosine_similarity, [x, y])
        check_op(lambda x: gram(x.transpose(1, 3)[:, 1:]), [x])
        check_op(lambda x: gram(x[:, ::2], x.flip(0)[:3, ::2]), [x])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_centered(self, dtype: torch.dtype) -> None:
        x, y = ((torch.randn(n, 40, device=DEVICE) + 3).to(dtype) for n in (7, 5))
        # squared, or the upstream gradient's own pattern would cancel
        check_op(lambda x: gram(x, centered=True).square(), [x])
        check_op(lambda x, y: gram(x, y, centered=True).square(), [x, y])
        wide = x.double() - x.double().mean(0)
        check_close("centred", gram(x, centered=True), wide @ wide.t(), 1e-5)

    def test_contract(self) -> None:
        y = torch.randn(5, 12, device=DEVICE)
        for function in (lambda x: gram(x, centered=True).square(), lambda x: gram(x, y)):
            check_contract(function, torch.randn(4, 12, device=DEVICE))
            check_compiled(function, torch.randn(4, 12, device=DEVICE), "aot_eager")

    def test_edges(self) -> None:
        empty = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
        assert gram(empty).shape == (0, 0)
        assert gram(empty, centered=True).shape == (0, 0)
        assert torch.autograd.grad(gram(empty, torch.ones(3, 4, device=DEVICE)).sum(), empty)[0].shape == (0, 4)
        bad = torch.tensor([[1.0, float("nan")], [2.0, 3.0]], device=DEVICE)
        assert gram(bad).isnan().tolist() == [[True, True], [True, False]]
        channels = torch.randn(4, 3, 5, 5, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
        gradient = torch.autograd.grad(gram(channels).sum(), channels)[0]
        assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_gram_errors() -> None:
    x = torch.ones(3, 4)
    for function in (gram, cosine_similarity):
        name = function.__name__
        with pytest.raises(TypeError, match=f"{name}: x must be a torch.Tensor, got list"):
            function([1.0])
        with pytest.raises(TypeError, match="int64"):
            function(x, x.long())
        with pytest.raises(ValueError, match=r"x must be \(N, ...\), got \(3,\)"):
            function(x[:, 0])
        with pytest.raises(ValueError, match=r"same width, got \(3, 4\) and \(3, 2\)"):
            function(x, x[:, :2])
    with pytest.raises(TypeError, match="centered must be True or False"):
        gram(x, centered=1)


def test_gram_gradcheck() -> None:
    x, y = (
        torch.randn(4, 3, dtype=torch.float64).requires_grad_(),
        torch.randn(2, 3, dtype=torch.float64).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda x: gram(x, centered=True), x)
    assert torch.autograd.gradcheck(gram, (x, y))
    assert torch.autograd.gradcheck(cosine_similarity, (x,))
