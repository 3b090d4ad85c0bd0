"""What only the reference can show: gradcheck, and that nothing in it waits for an accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels.ops import angular_margin, gram, softmax_kl
from kdkernels.ops.angular_margin import reference as angular_reference
from kdkernels.ops.gram import reference as gram_reference
from kdkernels.ops.softmax_kl import reference as softmax_reference

D = torch.float64


@pytest.fixture(autouse=True)
def _reference() -> Any:
    with kdkernels.use_backend("reference"):
        yield


@pytest.mark.parametrize("lam", [(0.0, 0.3, 1.0)])
@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0.1, 0.2, 2, 8)])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_softmax_kl(lam: tuple[float, ...], weights: tuple[float, ...], reduction: str) -> None:
    student, teacher = torch.randn(3, 6, dtype=D, requires_grad=True), 3 * torch.randn(3, 6, dtype=D)
    a, b = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 4])
    names = ("ce_weight", "kl_weight", "target_weight", "other_weight")

    def loss(s: torch.Tensor) -> torch.Tensor:
        options = dict(zip(names, weights, strict=True))
        return softmax_kl.softmax_kl(
            s, teacher, a, b, torch.tensor(lam, dtype=D), temperature=2.5, reduction=reduction, **options
        )

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("row_norm", ["l2", "l1"])
def test_sp(row_norm: str) -> None:
    student, teacher = torch.randn(5, 7, dtype=D, requires_grad=True), torch.randn(5, 4, dtype=D)
    assert torch.autograd.gradcheck(
        lambda s: gram.sp_gram([s, s.exp()], [teacher, teacher], scale=0.3, row_norm=row_norm), student
    )


def test_cosines() -> None:
    a, b = torch.randn(4, 3, dtype=D, requires_grad=True), torch.randn(5, 3, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(gram.cosine_similarity, (a, b))
    torch.testing.assert_close(
        gram.cosine_similarity(a, b), torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    )


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("local_weight", [0.0, 0.3])
def test_angular_margin(local_weight: float, reduce: bool) -> None:
    student, teacher = torch.randn(2, 3, 5, 4, dtype=D, requires_grad=True), torch.randn(2, 2, 5, 4, dtype=D)
    options: dict[str, Any] = {"margin": 1.35, "scale": 4.0, "local_weight": local_weight, "layer_weights": [2.0, 3.0]}
    assert torch.autograd.gradcheck(
        lambda s: angular_margin.angular_margin([s, s * s], [teacher, teacher], reduce=reduce, **options), student
    )


@pytest.mark.parametrize("size", [(2, 2), (3, 3)])
def test_angular_margin_of_tiny_quadrants(size: tuple[int, int]) -> None:
    student, teacher = (torch.rand(6, 3, *size, dtype=D) + 0.2 for _ in range(2))
    student[::2, :, 0, 0] += 5  # a quadrant whose G is under the clamp of its norm
    teacher[::3, :, 0, 0] += 5
    options: dict[str, Any] = {"margin": 1.35, "scale": 64.0, "local_weight": 0.5, "layer_weights": [1e3]}
    loss = lambda s: angular_margin.angular_margin(s, teacher, **options)  # noqa: E731
    assert torch.autograd.gradcheck(loss, student.requires_grad_(), rtol=1e-4, atol=1e-4)


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
    monkeypatch.setattr(softmax_reference, "may_hold", lambda condition: True)  # as on an accelerator
    s, t = torch.randn(6, 5), torch.randn(6, 5)
    a, b, lam = torch.tensor([0, 1, 2, -100, 4, 0]), torch.tensor([1, 1, 3, 2, 0, 0]), torch.rand(6)
    maps = torch.randn(2, 3, 4, 4)
    weights, grad = [0.1, 0.2, 0.3, 0.4], torch.tensor(2.0)
    with NoSynchronisation():
        loss, stats, scale = softmax_reference.forward(s, t, a, b, lam, 4.0, weights, -100, "batchmean", True)
        softmax_reference.backward(grad, s, t, a, b, lam, stats, scale, 4.0, weights, -100)
        loss, w = gram_reference.sp_forward([s, maps.view(6, -1)], [t, t], "l2", 1.0, 1e-12, False, True)
        gram_reference.sp_backward(grad, [s, maps.view(6, -1)], w)
        saved = gram_reference.cosine_forward(s, t)
        gram_reference.cosine_backward(saved[0], s, t, *saved)
        loss, kappa = angular_reference.forward([maps], [maps + 1], [1.0], 1.35, 64.0, 0.2, True, True)
        angular_reference.backward(grad, [maps], kappa)
    assert loss.isfinite()
    with pytest.raises(AssertionError, match="waits"), NoSynchronisation():
        loss.item()
