"""nkd_loss, dist_loss, mlld_loss and cwd_loss: their authors' numbers, scales, modules, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE, HALF, check_compiled, check_contract, check_op, gradients, wave
from torch import Tensor

from kdkernels import (
    CWDLoss,
    DISTLoss,
    MLLDLoss,
    NKDLoss,
    cwd_loss,
    dist_loss,
    kd_loss,
    mlld_loss,
    nkd_loss,
)
from kdkernels.ops.multi_level import Levels, multi_level

GOLDEN = json.loads((Path(__file__).parent / "golden" / "logits.json").read_text())
KINDS = ("nkd", "dist", "dist_tau", "dist_map", "mlld_kd", "mlld_cc", "mlld_bc", "mlld_whole", "cwd")
ROWS = {row["name"]: row for row in GOLDEN if row["name"].split("[")[0] in KINDS}
X, Y, MAPS = torch.ones(4, 3, device=DEVICE), torch.ones(4, 5, device=DEVICE), torch.ones(2, 3, 4, 4, device=DEVICE)
A = torch.zeros(4, dtype=torch.int64, device=DEVICE)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


# ---- the authors' numbers


def tensors(recipe: Any, dtype: torch.dtype) -> list[Tensor]:
    recipes = recipe if isinstance(recipe, list) else [recipe]
    return [wave(r["shape"], r["seed"], r["scale"], dtype) for r in recipes]


def loss_of(row: dict[str, Any]) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    kind, args = row["name"].split("[")[0], row["args"]
    if kind == "cwd":
        return lambda s, t: args["loss_weight"] * cwd_loss(s[0], t[0], temperature=args["tau"])
    if kind == "dist_tau":
        options = {"temperature": args["tau"], "beta": args["inter_loss_weight"], "gamma": args["intra_loss_weight"]}
        return lambda s, t: dist_loss(s[0], t[0], **options)
    if kind.startswith("dist"):
        return lambda s, t: dist_loss(s[0], t[0], class_dim=1, beta=args["beta"], gamma=args["gamma"])
    if kind in ("mlld_kd", "mlld_cc", "mlld_bc"):
        weights = ([float(kind == "mlld_kd")], 0.0, float(kind == "mlld_bc"), float(kind == "mlld_cc"), 1.0)
        return lambda s, t: multi_level(Levels(s[0], t[0], [args["temperature"]], *weights))
    slope, offset, modulus = map(int, re.search(r"\((\d+)i\+(\d+)\)%(\d+)", row["labels"]).groups())
    n = (row["student"][0] if isinstance(row["student"], list) else row["student"])["shape"][0]
    y = (slope * torch.arange(n, device=DEVICE) + offset) % modulus
    if kind == "nkd":
        return lambda s, t: nkd_loss(s[0], t[0], y, temperature=args["temp"], gamma=args["gamma"])

    def whole(s: list[Tensor], t: list[Tensor]) -> Tensor:
        temperatures, weight = [4.0, 3.0, 5.0, 2.0, 6.0], args["KD_WEIGHT"]
        if row["name"].endswith("loss_kd"):
            return weight * mlld_loss(s[0], t[0], s[1], t[1], batch_weight=0, class_weight=0)
        if row["name"].endswith(("loss_bc", "loss_cc")):
            of_classes = float(row["name"].endswith("loss_cc"))
            grams = Levels(s[0], t[0], temperatures, [0.0] * 5, 0.0, 1 - of_classes, of_classes)
            return weight * multi_level(grams) + 0 * s[1].sum()
        ce = F.cross_entropy(s[0], y) + F.cross_entropy(s[1], y)
        return args["CE_WEIGHT"] * ce + weight * mlld_loss(s[0], t[0], s[1], t[1])

    return whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(ROWS))
def test_golden_row(name: str, dtype: torch.dtype) -> None:
    """To 1e-9 in fp64 and 1e-5 in fp32: the loss, and norm, first numbers and a projection of the gradients."""
    row = ROWS[name]
    relative, absolute = (1e-9, 1e-12) if dtype == torch.float64 else (1e-5, 1e-7)
    students = [x.requires_grad_() for x in tensors(row["student"], dtype)]
    loss = loss_of(row)(students, tensors(row["teacher"], dtype))
    assert loss.item() == pytest.approx(row["loss"], rel=relative, abs=absolute)
    found = torch.autograd.grad(loss, students)
    for g, norm, dot, first in zip(found, row["grad_norm"], row["grad_dot_wave"], row["grad_first"], strict=True):
        slack = absolute + relative * norm
        assert g.double().norm().item() == pytest.approx(norm, rel=relative, abs=absolute)
        assert g.flatten()[:3].tolist() == pytest.approx(first, rel=relative, abs=slack)
        along = wave(g.shape, 0.5, 1)
        assert (g.double() * along).sum().item() == pytest.approx(dot, rel=relative, abs=slack * along.norm().item())


def test_every_kind_has_its_golden_rows() -> None:
    counts = {kind: sum(name.split("[")[0] == kind for name in ROWS) for kind in KINDS}
    assert min(counts.values()) >= 2, counts


# ---- scales, shapes and modules


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_nkd_is_nckd_and_the_teachers_entropy(temperature: float) -> None:
    """Among the non-target classes a cross entropy is KL + entropy, and KL is the op's decoupled term."""
    from kdkernels.ops.softmax_kl import Labels, Rows, Terms, softmax_kl

    s, t, y = randn(6, 9), randn(6, 9), torch.arange(6, device=DEVICE)
    one = F.one_hot(y, 9).bool()
    q_t = (t.masked_fill(one, -math.inf) / temperature).softmax(1)
    rows = Rows(s, t, Labels(y), Terms(non_target_kl=1.0), temperature, "none")
    others = softmax_kl(rows) + torch.special.entr(q_t).sum(1)
    target = t.softmax(1)[one] * F.cross_entropy(s, y, reduction="none")
    expected = target + 0.8 * temperature**2 * others
    options = {"temperature": temperature, "gamma": 0.8}
    torch.testing.assert_close(nkd_loss(s, t, y, **options, reduction="none"), expected)
    torch.testing.assert_close(nkd_loss(s, t, y, **options, reduction="sum"), expected.sum())
    torch.testing.assert_close(NKDLoss(**options)(s, t, y), expected.mean())


def test_positions_are_rows() -> None:
    s, t, y = randn(2, 5, 3, 4), randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4), device=DEVICE)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (s, t)]
    rows = nkd_loss(s, t, y, class_dim=1, reduction="none")
    assert rows.shape == (2, 3, 4)
    torch.testing.assert_close(rows.flatten(), nkd_loss(*flat, y.flatten(), reduction="none"))
    torch.testing.assert_close(dist_loss(s, t, class_dim=1), dist_loss(*flat))


def test_dist_is_one_minus_pearson() -> None:
    s, t = randn(6, 5), randn(6, 5)
    q = [(x / 2).softmax(1) for x in (s, t)]
    rows = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*q, strict=True)])
    columns = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*(x.t() for x in q), strict=True)])
    expected = 4 * (3 * (1 - rows).mean() + 0.5 * (1 - columns).mean())
    torch.testing.assert_close(DISTLoss(2.0, 3.0, 0.5)(s, t), expected, rtol=1e-5, atol=0)  # its eps
    torch.testing.assert_close(DISTLoss(2.0, 3.0, 0.5, eps=1e-14)(s, t), expected)


def test_mlld_of_two_views() -> None:
    """Both views at every temperature, or the authors' code: the strong one at three, once more the weak one at two."""
    weak, strong = [randn(6, 9), randn(6, 9)], [randn(4, 9), randn(4, 9)]
    kl = {T: [kd_loss(*view, temperature=T) for view in (weak, strong)] for T in (2.0, 3.0, 4.0, 5.0, 6.0)}
    first = mlld_loss(*weak)
    published = first + sum(kl[T][T in (3.0, 4.0, 5.0)] for T in kl)
    torch.testing.assert_close(mlld_loss(*weak, *strong), published)
    torch.testing.assert_close(MLLDLoss()(*weak, *strong), published)
    everywhere = mlld_loss(*weak, *strong, strong_temperatures=tuple(kl))
    torch.testing.assert_close(everywhere, first + sum(pair[1] for pair in kl.values()))
    torch.testing.assert_close(
        mlld_loss(*weak, *strong, strong_temperatures=()), first + sum(p[0] for p in kl.values())
    )


def test_mlld_masks_are_shares() -> None:
    """Of five rows three are no surer than the median, of six classes three; all of them at quantile 1."""
    s, t = randn(5, 6), randn(5, 6)
    kl = kd_loss(s, t, temperature=2.0)
    q_s, q_t = (s / 2).softmax(1), (t / 2).softmax(1)
    batch = (q_t @ q_t.t() - q_s @ q_s.t()).square().sum() / 5
    classes = (q_t.t() @ q_t - q_s.t() @ q_s).square().sum() / 6
    options = {"temperatures": [2.0], "strong_temperatures": [], "batch_weight": 0.5, "class_weight": 2.0}
    torch.testing.assert_close(mlld_loss(s, t, **options), 0.6 * (kl + 0.5 * batch) + 0.5 * 2 * classes)
    torch.testing.assert_close(mlld_loss(s, t, **options, quantile=1.0), kl + 0.5 * batch + 2 * classes)
    sure = torch.full_like(t, -1e3).scatter(1, torch.arange(5, device=DEVICE)[:, None], 1e3)  # confidence 1 everywhere
    none = {**options, "batch_weight": 0.0, "class_weight": 0.0}
    torch.testing.assert_close(mlld_loss(s, sure, **none), kd_loss(s, sure, temperature=2.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_cwd_has_the_pixels_of_a_channel_as_rows(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    s, t = (randn(2, 3, 5, 7, dtype=dtype).to(memory_format=memory_format) for _ in range(2))
    check_op(lambda s, t: cwd_loss(s, t, temperature=2.0), [s], constants=[t], upstream=1000.0)
    flat = [x.flatten(2) for x in (s, t)]
    rows = cwd_loss(s, t, temperature=2.0, reduction="none")
    assert rows.shape == (2, 3)
    torch.testing.assert_close(rows, kd_loss(*flat, temperature=2.0, reduction="none"))
    torch.testing.assert_close(CWDLoss(2.0)(s, t), rows.mean())
    torch.testing.assert_close(cwd_loss(s, t, temperature=2.0, reduction="sum"), rows.sum())


def test_cwd_keeps_the_contract() -> None:
    t = randn(2, 3, 4, 4, dtype=torch.float32)
    check_contract(lambda s: cwd_loss(s, t), randn(2, 3, 4, 4, dtype=torch.float32))
    check_compiled(lambda s: cwd_loss(s, t), randn(2, 3, 4, 4, dtype=torch.float32))
    s = t.clone().requires_grad_()
    loss = cwd_loss(s, t)
    assert loss == 0
    assert gradients(loss, [s])[0].abs().max() == 0
    assert cwd_loss(t[:0], t[:0]) == 0


def test_the_teacher_is_a_constant() -> None:
    s, t, y = randn(4, 5).requires_grad_(), randn(4, 5).requires_grad_(), torch.arange(4, device=DEVICE)
    total = nkd_loss(s, t, y) + dist_loss(s, t) + mlld_loss(s, t, s, t)
    total = total + cwd_loss(s[:, None], t[:, None])
    total.backward()
    assert t.grad is None
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_modules_show_their_options() -> None:
    assert "gamma=2.0" in repr(NKDLoss(gamma=2.0))
    assert "beta=2.0" in repr(DISTLoss(beta=2.0))
    assert "quantile=0.3" in repr(MLLDLoss(quantile=0.3))
    assert "temperature=2.0" in repr(CWDLoss(2.0))


# ---- what is refused

REFUSED: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "nkd shapes": (ValueError, r"nkd_loss: .*\(4, 3\) and \(4, 5\)", lambda: nkd_loss(X, Y, A)),
    "nkd labels": (ValueError, r"nkd_loss: target must have shape \(4,\), got \(3,\)", lambda: nkd_loss(X, X, A[:3])),
    "nkd dense": (TypeError, "target must be int64 class indices, got torch.float32", lambda: nkd_loss(X, X, X)),
    "nkd gamma": (ValueError, "nkd_loss: gamma must be zero or positive", lambda: nkd_loss(X, X, A, gamma=-1.0)),
    "nkd T": (ValueError, "NKDLoss: temperature must be positive", lambda: NKDLoss(0.0)),
    "nkd ignore": (TypeError, "ignore_index must be an int, got float", lambda: nkd_loss(X, X, A, ignore_index=1.0)),
    "nkd reduction": (ValueError, "'mean', 'sum' or 'none', got 'max'", lambda: nkd_loss(X, X, A, reduction="max")),
    "dist shapes": (ValueError, r"dist_loss: .*\(4, 3\) and \(4, 5\)", lambda: dist_loss(X, Y)),
    "dist eps": (ValueError, "dist_loss: eps must be positive", lambda: dist_loss(X, X, eps=0.0)),
    "dist beta": (ValueError, "DISTLoss: beta must be zero or positive", lambda: DISTLoss(beta=-1.0)),
    "mlld shapes": (ValueError, r"mlld_loss: .*\(4, 3\) and \(4, 5\)", lambda: mlld_loss(X, Y)),
    "mlld maps": (ValueError, r"must be \(N, C\), got \(2, 3, 4, 4\)", lambda: mlld_loss(MAPS, MAPS)),
    "mlld strong": (ValueError, "go together", lambda: mlld_loss(X, X, X)),
    "mlld strong shapes": (ValueError, r"strong view: .*\(4, 3\) and \(4, 5\)", lambda: mlld_loss(X, X, X, Y)),
    "mlld number": (TypeError, "temperatures must be a sequence of numbers", lambda: mlld_loss(X, X, temperatures=2.0)),
    "mlld none": (ValueError, "one or more", lambda: mlld_loss(X, X, temperatures=(), strong_temperatures=())),
    "mlld other": (ValueError, "strong_temperatures among them", lambda: MLLDLoss(strong_temperatures=(7.0,))),
    "mlld quantile": (ValueError, r"quantile must be in \[0, 1\], got 2.0", lambda: mlld_loss(X, X, quantile=2.0)),
    "cwd shapes": (
        ValueError,
        r"one shape, got \(2, 3, 4, 4\) and \(2, 3, 4, 2\)",
        lambda: cwd_loss(MAPS, MAPS[..., :2]),
    ),
    "cwd rows": (ValueError, r"\(N, C, H, W\)", lambda: cwd_loss(X, X)),
    "cwd no pixels": (ValueError, "no pixels", lambda: cwd_loss(MAPS[..., :0], MAPS[..., :0])),
    "cwd reduction": (ValueError, "CWDLoss: reduction must be", lambda: CWDLoss(reduction="batchmean")),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_bad_input_is_named(name: str) -> None:
    error, message, call = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
