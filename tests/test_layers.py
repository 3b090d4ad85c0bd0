"""Layers and positions: layer_weights and layer_reduction of sp_loss and amd_loss, class_dim of stkd_loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import DEVICE, check_close, check_op, gradients
from torch import Tensor, nn

from kdkernels import AMDLoss, SPLoss, STKDLoss, amd_loss, sp_loss, stkd_loss

pytestmark = pytest.mark.usefixtures("backend")
B, L = 5, 3
SHAPES = [(B, 4, 8, 8), (B, 5, 4, 6), (B, 2, 3, 3)]
WEIGHTS = [2.0, 0.0, 0.25]
LOSSES: dict[str, tuple[Callable[..., Tensor], type[nn.Module]]] = {"sp": (sp_loss, SPLoss), "amd": (amd_loss, AMDLoss)}


def layers(extra: int) -> list[Tensor]:
    """Float32 activations of all layers, with ``extra`` channels."""
    return [torch.randn(b, c + extra, *size, device=DEVICE).relu() for b, c, *size in SHAPES]


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["ones", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_layers_are_weighted_and_reduced(name: str, reduction: str, weights: list[float] | None) -> None:
    loss, module = LOSSES[name]
    students, teachers = layers(0), layers(3)
    alone = torch.stack([loss(s, t, reduction=reduction) for s, t in zip(students, teachers, strict=True)])
    assert alone.std() > 0.01 * alone.mean()
    each = alone * torch.tensor(weights or [1.0] * L, device=DEVICE)
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / L}
    for layer_reduction, value in expected.items():
        options: dict[str, Any] = {
            "reduction": reduction,
            "layer_weights": weights,
            "layer_reduction": layer_reduction,
        }
        check_close(layer_reduction, loss(students, teachers, **options), value, 1e-6)
        check_close(f"module, {layer_reduction}", module(**options)(students, teachers), value, 1e-6)
    check_close("default", loss(students, teachers, reduction=reduction, layer_weights=weights), expected["sum"], 1e-6)


@pytest.mark.parametrize("layer_reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients_of_layers_meet_the_definition(name: str, layer_reduction: str) -> None:
    """check_op's upstream gradient differs from layer to layer. A layer of weight 0 gets zeros."""
    students, teachers = layers(0), layers(3)

    def function(*x: Tensor) -> Tensor:
        options = {"layer_weights": WEIGHTS, "layer_reduction": layer_reduction}
        return LOSSES[name][0](list(x[:L]), list(x[L:]), **options)

    _, found = check_op(function, students, constants=teachers, upstream=1e3)
    assert [bool(g.norm() > 0) for g in found] == [True, False, True]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("layer_reduction", ["none", "mean", "sum"])
def test_amd_has_a_value_for_each_layer_and_sample(layer_reduction: str, reduction: str) -> None:
    students, teachers = layers(0), layers(3)
    table = torch.stack(
        [
            torch.stack([amd_loss(s[i : i + 1], t[i : i + 1], local_weight=0.2) for i in range(B)])
            for s, t in zip(students, teachers, strict=True)
        ]
    ) * torch.tensor(WEIGHTS, device=DEVICE).view(L, 1)
    options: dict[str, Any] = {"local_weight": 0.2, "layer_weights": WEIGHTS}
    options |= {"reduction": reduction, "layer_reduction": layer_reduction}
    expected = table if reduction == "none" else table.sum(1) / (B if reduction == "mean" else 1)
    if layer_reduction != "none":
        expected = expected.sum(0) / (L if layer_reduction == "mean" else 1)
    assert expected.shape == (L,) * (layer_reduction == "none") + (B,) * (reduction == "none")
    check_close("loss", amd_loss(students, teachers, **options), expected, 1e-5)
    check_close("module", AMDLoss(**options)(students, teachers), expected, 1e-5)
    check_op(lambda *x: amd_loss(list(x[:L]), list(x[L:]), **options), students, constants=teachers, upstream=1e4)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("layer_reduction", ["none", "mean", "sum"])
def test_amd_weights_by_area(layer_reduction: str, reduction: str) -> None:
    students, teachers = layers(0), layers(3)
    areas = [float(h * w) ** 2 for *_, h, w in SHAPES]
    options = {"reduction": reduction, "layer_reduction": layer_reduction}
    value = amd_loss(students, teachers, layer_weights="area", **options)
    assert torch.equal(value, amd_loss(students, teachers, layer_weights=areas, **options))
    assert torch.equal(value, AMDLoss(layer_weights="area", **options)(students, teachers))
    if layer_reduction == "none" and reduction == "mean":
        check_close("first layer", value[0], 64.0**2 * amd_loss(students[0], teachers[0]), 1e-6)


def test_any_iterable_of_numbers_is_taken() -> None:
    students, teachers = layers(0), layers(3)
    expected = sp_loss(students, teachers, layer_weights=[1.0, 2.0, 3.0])
    for weights in ((1, 2, 3), iter([1.0, 2.0, 3.0]), torch.arange(1, 4).numpy()):
        assert torch.equal(sp_loss(students, teachers, layer_weights=weights), expected)


# ---- positions


N, C, D1, D2 = 4, 7, 3, 2


def dense_labels(kind: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Labels of (N, C, d1, d2) logits, and the same of its positions as rows."""
    a, b = (torch.randint(C, (N, D1, D2), device=DEVICE) for _ in range(2))
    a[1, 2, 0] = -100
    if kind == "hard":
        return (a,), (a.flatten(),)
    if kind == "dense":
        y = torch.rand(N, C, D1, D2, dtype=dtype, device=DEVICE)
        return (y,), (y.permute(0, 2, 3, 1).reshape(-1, C),)
    lam = torch.rand((N,) if kind == "lam per sample" else (), dtype=dtype, device=DEVICE)
    rows = lam.repeat_interleave(D1 * D2) if lam.dim() else lam
    return (a, b, lam), (a.flatten(), b.flatten(), rows)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["hard", "dense", "lam per sample", "one lam"])
def test_stkd_on_dense_predictions(kind: str, reduction: str, memory_format: torch.memory_format) -> None:
    dtype = torch.float32
    s, t = (torch.randn(N, C, D1, D2, device=DEVICE).contiguous(memory_format=memory_format) for _ in range(2))
    s.requires_grad_()
    labels, row_labels = dense_labels(kind, dtype)
    options: dict[str, Any] = {"reduction": reduction, "temperature": 2.0}
    if kind != "dense":
        options["decouple"] = (1.0, 3.0)
    flat = [x.detach().permute(0, 2, 3, 1).reshape(-1, C).requires_grad_() for x in (s, t)]
    value, rows = stkd_loss(s, t, *labels, class_dim=1, **options), stkd_loss(*flat, *row_labels, **options)
    assert value.shape == ((N, D1, D2) if reduction == "none" else ())
    check_close("loss", value.flatten(), rows.view(-1), 1e-6)
    upstream = torch.linspace(1, 2, value.numel(), device=DEVICE)
    expected = gradients(rows, [flat[0]], upstream.view(rows.shape))[0].view(N, D1, D2, C)
    check_close("gradient", gradients(value, [s], upstream.view(value.shape))[0].permute(0, 2, 3, 1), expected, 1e-6)
    module = STKDLoss(class_dim=1, **options)
    assert torch.equal(module(s, t, *labels), value)
    last = (x if not x.is_floating_point() or x.dim() < 4 else x.permute(0, 2, 3, 1) for x in labels)
    moved = stkd_loss(s.permute(0, 2, 3, 1), t.permute(0, 2, 3, 1), *last, **options)
    check_close("classes last", moved, value, 1e-6)
