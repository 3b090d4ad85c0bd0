"""How the ops stand in PyTorch: who listens sees them and changes nothing, and what cannot be done is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import DEVICE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels.ops import library
from kdkernels.ops.angular_margin import ActivationPairs
from kdkernels.ops.correlation import CorrelationOptions, ViewRows
from kdkernels.ops.energy import Activation, AttentionPairs, attention, energy
from kdkernels.ops.gram import LayerPairs, SPOptions, cosine_similarity
from kdkernels.ops.softmax_kl import Labels, Rows, Terms

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Loss, tuple[int, ...]]] = {
    "softmax_kl": (kdkernels.kd_loss, (6, 10)),
    "sp_gram": (kdkernels.sp_loss, (6, 3, 4, 4)),
    "angular_margin": (kdkernels.amd_loss, (6, 3, 4, 4)),
    "attention": (lambda s, t: attention(AttentionPairs([s], [t], [1.0])), (6, 3, 4, 4)),
    "energy": (lambda s, t: (energy(Activation(s, normalize=True)) * t.sum()).sum(), (6, 3, 4, 4)),
    "correlation": (kdkernels.correlation_loss, (8, 5)),
    "cosine_similarity": (lambda s, t: (cosine_similarity(s, t) * t.sum()).sum(), (6, 5)),
}
each_op = pytest.mark.parametrize("name", list(LOSSES))


def names(op: str) -> set[str]:
    return {f"kdkernels::{op}", f"kdkernels::{op}_backward"}


def pair(name: str) -> tuple[Loss, Tensor, Tensor]:
    loss, shape = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    return loss, student.requires_grad_(), teacher


def step(name: str) -> tuple[Tensor, Tensor]:
    loss, student, teacher = pair(name)
    value = loss(student, teacher)
    value.backward(torch.tensor(0.7, device=DEVICE))
    assert student.grad is not None
    return value.detach(), student.grad


# ---- who listens


class Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.heard.add(func.name())
        return func(*args, **(kwargs or {}))


@each_op
def test_a_mode_sees_the_op_and_changes_nothing(name: str) -> None:
    plain = step(name)
    with Listener() as listener:
        seen = step(name)
    assert names(name) <= listener.heard
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


@each_op
def test_a_profiler_sees_the_op_and_changes_nothing(name: str) -> None:
    plain = step(name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seen = step(name)
    assert names(name) <= {event.name for event in profile.events()}
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


class Spy(Tensor):
    heard: set[str] = set()  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.heard.add(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@each_op
def test_a_tensor_subclass_meets_the_op_and_changes_nothing(name: str) -> None:
    loss, student, teacher = pair(name)
    Spy.heard.clear()
    plain, spied = loss(student, teacher), loss(student.detach().as_subclass(Spy).requires_grad_(), teacher)
    assert f"kdkernels.{name}.default" in Spy.heard
    assert plain.item() == spied.item() != 0


@each_op
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_make_fx_records_the_op(backend: str, name: str) -> None:
    loss, student, teacher = pair(name)

    def gradient(s: Tensor, t: Tensor) -> Tensor:
        return torch.autograd.grad(loss(s, t), s)[0]

    with kdkernels.use_backend(backend):
        graph = make_fx(gradient)(student, teacher)
        assert torch.equal(graph(student, teacher), gradient(student, teacher))
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert {f"kdkernels.{name}.default", f"kdkernels.{name}_backward.default"} <= targets


@each_op
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values_run_no_kernel(name: str, kind: str) -> None:
    """Forward and backward, with the shapes, dtypes and strides of real tensors."""
    loss, shape = LOSSES[name]
    value, gradient = step(name)
    if kind == "meta":
        s, t = (torch.empty(shape, device="meta") for _ in range(2))
        made = loss(s.requires_grad_(), t)
        made.backward()
    else:
        with FakeTensorMode(), Listener() as listener:
            s, t = (torch.empty(shape, device=DEVICE) for _ in range(2))
            made = loss(s.requires_grad_(), t)
            made.backward()
        assert names(name) <= listener.heard
    assert s.grad is not None
    assert made.is_meta == (kind == "meta")
    assert (made.shape, made.dtype) == (value.shape, value.dtype)
    assert (s.grad.shape, s.grad.dtype, s.grad.stride()) == (gradient.shape, gradient.dtype, gradient.stride())


# ---- derivatives


@each_op
def test_backward_twice_gives_the_same_bits(name: str) -> None:
    loss, student, teacher = pair(name)
    value = loss(student, teacher)
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.norm() > 0


@pytest.mark.parametrize("name", ["softmax_kl", "correlation", "cosine_similarity"])
def test_batched_gradients(name: str) -> None:
    """autograd's own vmap, which leaves no level behind to see."""
    loss, student, teacher = pair(name)
    value = loss(student, teacher)
    upstream = torch.tensor([1.0, -2.0], device=DEVICE)
    (batched,) = torch.autograd.grad(value, student, upstream, is_grads_batched=True, retain_graph=True)
    (single,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(batched, torch.stack([single, -2 * single]))


@pytest.mark.parametrize("name", ["sp_gram", "angular_margin", "attention"])
def test_batched_gradients_of_layers_are_refused(name: str) -> None:
    """PyTorch loops over a batch only for ops that return tensors, and these return one list."""
    loss, student, teacher = pair(name)
    upstream = torch.tensor([1.0, -2.0], device=DEVICE)
    with pytest.raises(RuntimeError, match=f"Batching rule not implemented for kdkernels::{name}_backward"):
        torch.autograd.grad(loss(student, teacher), student, upstream, is_grads_batched=True)


@each_op
def test_no_second_derivative(name: str) -> None:
    loss, student, teacher = pair(name)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        torch.autograd.grad(loss(student, teacher), student, create_graph=True)


@each_op
def test_no_forward_mode(name: str) -> None:
    loss, student, teacher = pair(name)
    student = student.detach()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{name}.*forward-mode"):
        loss(torch.autograd.forward_ad.make_dual(student, torch.ones_like(student)), teacher)


@each_op
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_transforms_of_functions_are_refused(transform: Callable[..., Any], name: str) -> None:
    loss, student, teacher = pair(name)
    if transform is torch.func.vmap:
        student, teacher = student[None], teacher[None]
    call = transform(loss, **({"in_dims": (0, 0)} if transform is torch.func.vmap else {}))
    with pytest.raises(RuntimeError, match=r"functorch transforms.*setup_context"):
        call(student.detach(), teacher)


# ---- records


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            Rows,
            "Tensor student, Tensor teacher, Tensor? target, Tensor? mixed, Tensor? lam, int ignore_index, "
            "float smoothing, float ce, float kl, float target_kl, float non_target_kl, float temperature, "
            "str reduction, str divergence, float beta, bool standardize",
        ),
        (
            LayerPairs,
            "Tensor[] student, Tensor[] teacher, float[] layer_weights, str reduction, str layer_reduction, "
            "str row_norm, float eps, bool zero_row_grad",
        ),
        (
            ActivationPairs,
            "Tensor[] student, Tensor[] teacher, float[] layer_weights, bool area_weights, str reduction, "
            "str layer_reduction, float margin, float sharpness, float local_weight",
        ),
        (ViewRows, "Tensor student, Tensor teacher, int views, float temperature, str reduction"),
    ],
)
def test_the_schema_of_a_record(record: type, expected: str) -> None:
    assert library.schema(record) == expected


X, Y, TARGET, LAM = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), torch.tensor(0.3)


@pytest.mark.parametrize(
    "record",
    [
        Rows(X, Y),
        Rows(X, Y, Labels(TARGET, TARGET, LAM, 7, 0.1), Terms(1.0, 2.0, 3.0, 4.0), 5.0, "none"),
        LayerPairs([X, Y], [Y, X], SPOptions([1.0, 2.0], "sum", "none", "l1", 1e-3, True)),
        ActivationPairs([X], [Y], [3.0], True, "none", "mean", 1.2, 32.0, 0.5),
        ViewRows(X, Y, CorrelationOptions(2, 0.5, "sum")),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_goes_there_and_back(record: tuple[Any, ...]) -> None:
    flat = library.flatten(record)
    assert len(flat) == library.schema(type(record)).count(",") + 1
    assert not any(isinstance(value, tuple) for value in flat)
    back = library.build(type(record), flat)
    assert type(back) is type(record)
    for old, new in zip(record, back, strict=True):
        assert type(old) is type(new)
        parts = zip(old, new, strict=True) if isinstance(old, (tuple, list)) else [(old, new)]
        assert all(a is b for a, b in parts)


def test_what_stands_behind_a_record_is_left_out() -> None:
    flat = [*library.flatten(ViewRows(X, Y, CorrelationOptions(2, 0.5))), "more", True]
    assert library.build(ViewRows, flat).options == CorrelationOptions(2, 0.5)


def test_a_layer_from_inference_mode_has_no_gradient_and_disturbs_none() -> None:
    student, teacher = torch.randn(4, 3, 5, 5, device=DEVICE, requires_grad=True), torch.rand(4, 2, 5, 5, device=DEVICE)
    with torch.inference_mode():
        frozen = student.detach() * 1
    for loss in (kdkernels.sp_loss, kdkernels.amd_loss):
        (expected,) = torch.autograd.grad(loss(student, teacher), student)
        (gradient,) = torch.autograd.grad(loss([student, frozen], [teacher, teacher]), student)
        assert torch.equal(gradient, expected)
