"""at_loss, ft_loss, nst_loss, ickd_loss, fsp_loss: the peers' figures, sizes that differ, layers, modules, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import DEVICE, HALF, check_close, check_op, gradients, refused, wave
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import kdkernels
from kdkernels import ATLoss, FSPLoss, FTLoss, ICKDLoss, NSTLoss, at_loss, fsp_loss, ft_loss, ickd_loss, nst_loss

LOSSES: dict[str, tuple[Callable[..., Tensor], type[nn.Module]]] = {
    "at": (at_loss, ATLoss),
    "ft": (ft_loss, FTLoss),
    "nst": (nst_loss, NSTLoss),
    "ickd": (ickd_loss, ICKDLoss),
    "fsp": (fsp_loss, FSPLoss),
}
each_loss = pytest.mark.parametrize("name", list(LOSSES))
ROWS = {row["name"]: row for row in json.loads((Path(__file__).parent / "golden" / "maps.json").read_text())}


def is_ours(row: dict[str, Any]) -> bool:
    """Ours takes |x|^p, and a difference to the power 1 or 2; the peers' own variants are the compat presets'."""
    kind, args, clamped = row["name"].split("[")[0], row.get("args") or {}, _recipes(row["student"])[0]["clamp"]
    if kind not in {*LOSSES, "at_mdistiller", "nst_mdistiller", "nst_zoo", "fsp_zoo"}:
        return False
    return args.get("p2", 2) < 3 and (clamped or all(args.get(p, 2) % 2 == 0 for p in ("p", "p1")))


def _recipes(x: Any) -> list[dict[str, Any]]:
    return x if isinstance(x, list) else [x]


def made(recipes: Any, dtype: torch.dtype) -> list[Tensor]:
    maps = [wave(r["shape"], r["seed"], r["scale"], dtype) for r in _recipes(recipes)]
    return [m.clamp(min=0) if r["clamp"] else m for m, r in zip(maps, _recipes(recipes), strict=True)]


def test_the_figures_that_are_ours() -> None:
    kinds = [name.split("[")[0] for name, row in ROWS.items() if is_ours(row)]
    assert {kind: kinds.count(kind) for kind in LOSSES} == {"at": 12, "ft": 10, "nst": 4, "ickd": 2, "fsp": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if is_ours(row)])
@pytest.mark.usefixtures("backend")
def test_golden(name: str, dtype: torch.dtype) -> None:
    """To 1e-9 in fp64 and to 1e-5 in fp32."""
    row, relative = ROWS[name], 1e-9 if dtype == torch.float64 else 1e-5
    student, teacher = [x.requires_grad_() for x in made(row["student"], dtype)], made(row["teacher"], dtype)
    loss_fn = LOSSES[name.split("[")[0].split("_")[0]][0]
    arguments = row.get("args") or {}
    if refused(lambda *x: loss_fn(list(x[: len(student)]), teacher, **arguments), *student):
        return
    loss = loss_fn(student, teacher, **arguments)
    assert loss.item() == pytest.approx(row["loss"], rel=relative, abs=1e-12)
    if 1 in (arguments.get("p"), arguments.get("p1")):
        return  # where the activation is 0, |x| has the slope 0 and the peers' x has 1
    for i, gradient in enumerate(gradients(loss, student)):
        norm, first = row["grad_norm"][i], torch.tensor(row["grad_first"][i], dtype=torch.float64)
        assert gradient.double().norm().item() == pytest.approx(norm, rel=relative, abs=1e-12)
        along = (gradient.double() * wave(gradient.shape, 0.5, 1)).sum().item()
        assert along == pytest.approx(row["grad_dot_wave"][i], abs=relative * norm * gradient.numel() ** 0.5 + 1e-12)
        assert (gradient.double().flatten()[:3].cpu() - first).abs().max() <= relative * norm + 1e-12


def maps(*sizes: int, dtype: torch.dtype = torch.float32, extra: int = 0, batch: int = 3) -> list[Tensor]:
    """A (B, C, H, W) of each size, relu'd but for a floor that keeps every map alive."""
    return [torch.randn(batch, 2 + i + extra, n, n).relu().add(0.01).to(DEVICE, dtype) for i, n in enumerate(sizes)]


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_larger_maps_are_pooled(name: str, dtype: torch.dtype) -> None:
    loss_fn = LOSSES[name][0]
    student, teacher = maps(6, 4, dtype=dtype), maps(4, 7)
    loss, _ = check_op(lambda *x: loss_fn(list(x[:2]), list(x[2:])), student, constants=teacher, upstream=1e3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(loss_fn(student, teacher), loss)
    wide, tall = student[0][:, :, :3], teacher[0][..., :2]  # (6, 3) and (4, 2)
    if name in ("at", "ft", "nst"):
        small = torch.nn.functional.adaptive_avg_pool2d(wide.float(), (3, 2)), tall.float()[:, :, :3]
        pooled = torch.nn.functional.adaptive_avg_pool2d(tall.float(), (3, 2))
        torch.testing.assert_close(loss_fn(wide, tall), loss_fn(small[0], pooled))


@each_loss
def test_layers_and_reductions(name: str) -> None:
    loss_fn, module = LOSSES[name]
    student, teacher = maps(6, 4, 4), maps(6, 4, 4)
    matrices = 2 if name == "fsp" else 3
    every = loss_fn(student, teacher, reduction="none", layer_reduction="none")
    assert every.shape == (matrices, 3)
    torch.testing.assert_close(loss_fn(student, teacher), every.mean(1).sum())
    torch.testing.assert_close(loss_fn(student, teacher, reduction="sum", layer_reduction="mean"), every.sum(1).mean())
    weights = [2.0, 0.5, 0.25][:matrices]
    weighted = (every.mean(1) * torch.tensor(weights, device=DEVICE)).sum()
    torch.testing.assert_close(loss_fn(student, teacher, layer_weights=weights), weighted)
    criterion = module(layer_weights=weights, reduction="batchmean")
    assert torch.equal(criterion(student, teacher), loss_fn(student, teacher, layer_weights=weights))
    assert "layer_weights=[2.0, 0.5" in repr(criterion)
    if name != "fsp":
        torch.testing.assert_close(loss_fn(student[0], teacher[0], reduction="none"), every[0])


@each_loss
def test_identical_networks_give_0(name: str) -> None:
    student = [x.requires_grad_() for x in maps(6, 4)]
    loss = LOSSES[name][0](student, [s.detach() for s in student])
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients(loss, student))


def test_options_reach_the_formula() -> None:
    student, teacher = maps(4, extra=1)[0], maps(4)[0]
    m_s, m_t = (torch.nn.functional.normalize(x.abs().pow(3).mean(1).flatten(1)) for x in (student, teacher))
    torch.testing.assert_close(ATLoss(p=3)(student, teacher), (m_s - m_t).square().mean())
    torch.testing.assert_close(FTLoss(p1=3, p2=1)(student, teacher), (m_s - m_t).abs().mean())
    torch.testing.assert_close(FTLoss(p1=3, p2=2)(student, teacher), (m_s - m_t).square().mean())
    torch.testing.assert_close(kdkernels.energy(student, 3), student.pow(3).mean(1))
    torch.testing.assert_close(kdkernels.energy(student, 3, normalize=True).flatten(1), m_s)
    gram = student.flatten(2) @ student.flatten(2).mT
    torch.testing.assert_close(kdkernels.channel_gram(student), gram)
    torch.testing.assert_close(kdkernels.channel_gram(student, student.flatten(2)[:, :1]), gram[:, :, :1])


def test_compiled_for_any_batch() -> None:
    torch._dynamo.reset()
    compilations = 0

    def total(*x: Tensor) -> Tensor:
        return sum(loss([*x[:2]], [*x[2:]]) for loss, _ in LOSSES.values())

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return aot_eager(graph, inputs)

    compiled = torch.compile(total, fullgraph=True, backend=counting)
    for batch in (8, 10, 12, 16):
        student, teacher = [x.requires_grad_() for x in maps(6, 4, batch=batch)], maps(4, 5, batch=batch)
        expected, actual = total(*student, *teacher), compiled(*student, *teacher)
        check_close("loss", actual, expected, 1e-6)
        for a, e in zip(gradients(actual, student), gradients(expected, student), strict=True):
            check_close("gradient", a, e, 1e-6)
    assert 1 <= compilations <= 2


X = torch.ones(2, 3, 4, 4, device=DEVICE)
ERRORS: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "at dimensions": (ValueError, r"at_loss: .*\(B, C, H, W\), got \(2, 3, 16\)", lambda: at_loss(X.flatten(2), X)),
    "at power": (ValueError, "at_loss: p must be 1 or more and finite, got 0.5", lambda: at_loss(X, X, p=0.5)),
    "at power of a module": (TypeError, "ATLoss: p must be a number, got str", lambda: ATLoss("2")),
    "at weights": (ValueError, "at_loss: layer_weights has 2", lambda: at_loss(X, X, layer_weights=[1, 2])),
    "at reduction": (ValueError, "at_loss: reduction must be", lambda: at_loss(X, X, reduction="max")),
    "at layers": (ValueError, "ATLoss: layer_reduction must be one of", lambda: ATLoss(layer_reduction="max")),
    "ft p2": (ValueError, "ft_loss: p2 must be 1 or 2, got 3", lambda: ft_loss(X, X, p2=3)),
    "ft p1": (ValueError, "FTLoss: p1 must be 1 or more", lambda: FTLoss(p1=0)),
    "nst batches": (ValueError, r"nst_loss: .*same B", lambda: nst_loss(X, X[:1])),
    "ickd channels": (
        ValueError,
        r"ickd_loss: .*same C \(project the student\), got \(2, 3, 4, 4\) and \(2, 2, 4, 4\)",
        lambda: ickd_loss(X, X[:, :2]),
    ),
    "fsp channels": (ValueError, "fsp_loss: .*same C layer by layer", lambda: fsp_loss([X, X], [X, X[:, :2]])),
    "fsp layers": (ValueError, "fsp_loss: needs two or more layers of each network, got 1", lambda: fsp_loss([X], [X])),
    "energy": (ValueError, r"energy: x must be \(B, C, H, W\), got \(3, 4, 4\)", lambda: kdkernels.energy(X[0])),
    "energy dtype": (TypeError, "energy: x must be float16", lambda: kdkernels.energy(X.long())),
    "gram": (ValueError, "channel_gram: x and y must be", lambda: kdkernels.channel_gram(X, X[..., :2])),
    "gram list": (TypeError, "channel_gram: y must be a torch.Tensor", lambda: kdkernels.channel_gram(X, [1.0])),
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_bad_input_is_named(name: str) -> None:
    error, message, call = ERRORS[name]
    with pytest.raises(error, match=message):
        call()
