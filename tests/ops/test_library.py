"""A plain eager call skips the dispatcher; whoever listens there meets the op, and both compute the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checking import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels.ops import library

LOSSES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "softmax_kl": (kdkernels.kd_loss, (6, 10)),
    "sp_gram": (kdkernels.sp_loss, (6, 3, 4, 4)),
    "angular_margin": (kdkernels.amd_loss, (6, 3, 4, 4)),
    "correlation": (kdkernels.correlation_loss, (8, 5)),
}


class Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.heard.add(func.name())
        return func(*args, **(kwargs or {}))


def step(name: str) -> tuple[Tensor, Tensor]:
    loss, shape = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward(torch.tensor(0.7, device=DEVICE))
    assert student.grad is not None
    return value.detach(), student.grad


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_mode_sees_the_op_and_changes_nothing(name: str) -> None:
    value, gradient = step(name)
    with Listener() as listener:
        seen_value, seen_gradient = step(name)
    assert {f"kdkernels::{name}", f"kdkernels::{name}_backward"} <= listener.heard
    assert torch.equal(value, seen_value)
    assert torch.equal(gradient, seen_gradient)


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_profiler_sees_the_op(name: str) -> None:
    step(name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(name)
    names = {event.name for event in profile.events()}
    assert {f"kdkernels::{name}", f"kdkernels::{name}_backward"} <= names


def test_a_tensor_subclass_meets_the_op() -> None:
    class Spy(Tensor):
        heard: set[str] = set()  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            cls.heard.add(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(4, 5, device=DEVICE)
    plain = kdkernels.kd_loss(x, 2 * x)
    spied = kdkernels.kd_loss(x.as_subclass(Spy), 2 * x)
    assert "kdkernels.softmax_kl.default" in Spy.heard
    assert plain.item() == spied.item() > 0


def test_meta_tensors_run_no_kernel() -> None:
    x = torch.empty(4, 5, device="meta", requires_grad=True)
    loss = kdkernels.kd_loss(x, x.detach())
    assert loss.is_meta
    assert loss.shape == ()


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_plain_call_asks_no_dispatcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward, whatever kind of sequence autograd hands on."""
    answers = []
    asked = library._somebody_listens
    monkeypatch.setattr(library, "_somebody_listens", lambda args: answers.append(asked(args)) or answers[-1])
    step(name)
    assert answers == [False, False]


def test_batched_gradients() -> None:
    """autograd's own vmap, which leaves no level behind to see."""
    student, teacher = torch.randn(6, 7, device=DEVICE, requires_grad=True), torch.randn(6, 7, device=DEVICE)
    loss = kdkernels.kd_loss(student, teacher)
    upstream = torch.tensor([1.0, -2.0], device=DEVICE)
    (batched,) = torch.autograd.grad(loss, student, upstream, is_grads_batched=True, retain_graph=True)
    (single,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(batched, upstream[:, None, None] * single)
