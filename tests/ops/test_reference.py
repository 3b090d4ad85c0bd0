"""What only the reference can show: gradcheck, and that nothing in it waits for an accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels.ops.angular_margin import ActivationPairs, angular_margin
from kdkernels.ops.angular_margin import reference as angular_reference
from kdkernels.ops.correlation import CorrelationOptions, ViewRows, correlation
from kdkernels.ops.energy import Activation, AttentionPairs, attention, energy
from kdkernels.ops.energy import reference as energy_reference
from kdkernels.ops.gram import LayerPairs, SPOptions, cosine_similarity, sp_gram
from kdkernels.ops.gram import reference as gram_reference
from kdkernels.ops.softmax_kl import Labels, Rows, Terms, softmax_kl
from kdkernels.ops.softmax_kl import reference as softmax_reference
from kdkernels.ops.softmax_kl import reference_common as softmax_common

D = torch.float64


@pytest.fixture(autouse=True)
def _reference() -> Any:
    with kdkernels.use_backend("reference"):
        yield


@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0.1, 0.2, 2, 8)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_softmax_kl(weights: tuple[float, ...], reduction: str) -> None:
    student, teacher = torch.randn(3, 6, dtype=D, requires_grad=True), 3 * torch.randn(3, 6, dtype=D)
    lam = torch.tensor((0.0, 0.3, 1.0), dtype=D)
    labels = Labels(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 4]), lam)
    terms = Terms(*map(float, weights))
    assert torch.autograd.gradcheck(lambda s: softmax_kl(Rows(s, teacher, labels, terms, 2.5, reduction)), student)


@pytest.mark.parametrize("layer_reduction", ["sum", "none"])
@pytest.mark.parametrize("row_norm", ["l2", "l1"])
def test_sp(row_norm: str, layer_reduction: str) -> None:
    student, teacher = torch.randn(5, 7, dtype=D, requires_grad=True), torch.randn(5, 4, dtype=D)
    options = SPOptions([0.3, 0.5], "sum", layer_reduction, row_norm)
    assert torch.autograd.gradcheck(lambda s: sp_gram(LayerPairs([s, s.exp()], [teacher, teacher], options)), student)


def test_cosines() -> None:
    a, b = torch.randn(4, 3, dtype=D, requires_grad=True), torch.randn(5, 3, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(cosine_similarity, (a, b))
    torch.testing.assert_close(
        cosine_similarity(a, b), torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    )


@pytest.mark.parametrize("views", [1, 3])
def test_correlation(views: int) -> None:
    student, teacher = torch.randn(6, 4, dtype=D, requires_grad=True), torch.randn(6, 5, dtype=D)
    for reduction in ("mean", "none"):
        options = CorrelationOptions(views, 0.5, reduction)
        assert torch.autograd.gradcheck(lambda s, o=options: correlation(ViewRows(s, teacher, o)), student)


@pytest.mark.parametrize("reductions", [("mean", "sum"), ("none", "mean"), ("sum", "none"), ("none", "none")])
@pytest.mark.parametrize("local_weight", [0.0, 0.3])
def test_angular_margin(local_weight: float, reductions: tuple[str, str]) -> None:
    student, teacher = torch.randn(2, 3, 5, 4, dtype=D, requires_grad=True), torch.randn(2, 2, 5, 4, dtype=D)
    options = ([2.0, 3.0], False, *reductions, 1.35, 4.0, local_weight)
    assert torch.autograd.gradcheck(
        lambda s: angular_margin(ActivationPairs([s, s * s], [teacher, teacher], *options)), student
    )


@pytest.mark.parametrize("size", [(2, 2), (3, 3)])
def test_angular_margin_of_tiny_quadrants(size: tuple[int, int]) -> None:
    student, teacher = (torch.rand(6, 3, *size, dtype=D) + 0.2 for _ in range(2))
    student[::2, :, 0, 0] += 5  # a quadrant whose G is under the clamp of its norm
    teacher[::3, :, 0, 0] += 5
    loss = lambda s: angular_margin(ActivationPairs([s], [teacher], [1e3], local_weight=0.5))  # noqa: E731
    assert torch.autograd.gradcheck(loss, student.requires_grad_(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_energy(power: float) -> None:
    student, teacher = torch.randn(2, 3, 3, 4, dtype=D, requires_grad=True), torch.randn(2, 2, 3, 4, dtype=D)
    for normalize in (False, True):
        assert torch.autograd.gradcheck(lambda x, n=normalize: energy(Activation(x, power, n)), student)
    for absolute in (False, True):
        options = ([2.0, 3.0], "none", "sum", power, absolute)
        assert torch.autograd.gradcheck(
            lambda s, o=options: attention(AttentionPairs([s, s * s], [teacher, teacher], *o)), student
        )


class NoSynchronisation(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading values, and shapes that depend on them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        assert name not in {
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::equal",
            "aten::_unique2",
            "aten::is_nonzero",
        }, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (softmax_reference, softmax_common):
        monkeypatch.setattr(module, "may_hold", lambda condition: True)  # as on an accelerator
    s, t = torch.randn(6, 5), torch.randn(6, 5)
    labels = Labels(torch.tensor([0, 1, 2, -100, 4, 0]), torch.tensor([1, 1, 3, 2, 0, 0]), torch.rand(6))
    maps, grad = torch.randn(2, 3, 4, 4), torch.tensor(2.0)
    rows = Rows(s, t, labels, Terms(0.1, 0.2, 0.3, 0.4), 4.0)
    layers = LayerPairs([s, maps.view(6, -1)], [t, t], SPOptions([1.0, 2.0]))
    pairs = ActivationPairs([maps], [maps + 1], [1.0], local_weight=0.2)
    with NoSynchronisation():
        loss, stats, scale = softmax_reference.forward(rows, True)
        softmax_reference.backward(grad, rows, stats, scale)
        loss, w = gram_reference.sp_forward(layers, True)
        gram_reference.sp_backward(grad, layers.student, w)
        grams = gram_reference.grams([*layers.student, *layers.teacher]).unflatten(0, (2, 2))
        gram_reference.sp_from_grams(grams, layers.options, True)
        gram_reference.products(s, t)
        saved = gram_reference.cosine_forward(s, t)
        gram_reference.cosine_backward(saved[0], s, t, *saved)
        loss, kappa = angular_reference.forward(pairs, True)
        energy_reference.backward(grad.expand(1, 2), pairs.student, kappa)
        energy_reference.forward(AttentionPairs(pairs.student, pairs.teacher, [1.0]), True)
    assert loss.isfinite()
    with pytest.raises(AssertionError, match="waits"), NoSynchronisation():
        loss.item()
