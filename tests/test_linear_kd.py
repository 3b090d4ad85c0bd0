"""linear_kd_loss against the definition on whole logits: every divergence, teacher and rest; and its options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import (
    DEVICE,
    backends_under_test,
    check_close,
    check_compiled,
    check_contract,
    check_op,
    wave,
)
from torch import Tensor

from kdkernels import Head, LinearKDLoss, TopK, linear_kd_loss, stkd_loss, use_backend
from kdkernels.heads import RESTS
from kdkernels.kd_loss import DIVERGENCES
from kdkernels.ops.library import flatten
from kdkernels.ops.linear_kd import LinearKD, Options, Teacher
from kdkernels.ops.softmax_kl import Terms

TOKENS, STUDENT, TEACHER, VOCABULARY = 6, 4, 5, 11
LABELS = torch.tensor([3, -100, 2, 7, -100, 6], device=DEVICE)
FP64 = torch.float64
TEACHERS = ("head", "logits", *RESTS)


def heads(dtype: torch.dtype = FP64) -> tuple[Tensor, ...]:
    """The student's hidden states, weights and bias, and the teacher's: the inputs of golden/language.json."""
    return (
        wave((TOKENS, STUDENT), 1, 1.3, dtype),
        wave((VOCABULARY, STUDENT), 2, 0.9, dtype),
        wave((VOCABULARY,), 5, 0.6, dtype),
        wave((TOKENS, TEACHER), 3, 1.1, dtype),
        wave((VOCABULARY, TEACHER), 4, 0.8, dtype),
        wave((VOCABULARY,), 6, 0.5, dtype),
    )


def teacher_of(kind: str, hidden: Tensor, weight: Tensor, bias: Tensor, temperature: float = 1.0) -> Any:
    if kind == "head":
        return Head(hidden, weight, bias)
    logits = hidden @ weight.T + bias
    if kind == "logits":
        return logits
    logprobs, ids = (logits / temperature).log_softmax(-1).topk(3)
    return TopK(ids, logprobs, kind, temperature)


# but for the reverse KL to a teacher without mass elsewhere, which is infinite and refused
DEFINED = [(k, d) for k in TEACHERS for d in DIVERGENCES if (k, d) != ("renormalise", "reverse")]


def distil(kind: str, target: Tensor | None = None, temperature: float = 1.0, **options: Any) -> Callable[..., Tensor]:
    """The loss of the three student's tensors and the teacher's."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        teacher = teacher_of(kind, *rest, temperature=temperature)
        return linear_kd_loss(Head(hidden, weight, bias), teacher, target, temperature=temperature, **options)

    return loss


@pytest.mark.parametrize(("kind", "divergence"), DEFINED)
def test_meets_the_definition(kind: str, divergence: str) -> None:
    *student, t_hidden, t_weight, t_bias = heads()
    options = {"divergence": divergence, "ce_weight": 0.3, "label_smoothing": 0.1, "chunk": 2, "temperature": 1.7}
    for backend in backends_under_test():
        with use_backend(backend):
            for dtype in (FP64, torch.float32):
                tensors = [x.to(dtype) for x in student]
                constants = [x.to(dtype) for x in (t_hidden, t_weight, t_bias)]
                check_op(distil(kind, LABELS, **options), tensors, constants=constants)


@pytest.mark.parametrize(("kind", "divergence"), DEFINED)
def test_gradcheck(kind: str, divergence: str) -> None:
    tensors = heads()
    student = [x[:4].clone().requires_grad_() for x in tensors[:3]]
    teacher = [x[:4] for x in tensors[3:]]
    loss = distil(kind, divergence=divergence, temperature=1.7, chunk=3)
    torch.autograd.gradcheck(lambda *x: loss(*x, *teacher), student, fast_mode=True)


def sum_of(kind: str, tensors: tuple[Tensor, ...], target: Tensor | None = LABELS, **options: Any) -> list[Tensor]:
    """The loss and its three gradients."""
    student = [x.clone().requires_grad_() for x in tensors[:3]]
    loss = distil(kind, target, **options)(*student, *tensors[3:])
    return [
        loss.detach(),
        *torch.autograd.grad((loss * torch.arange(1, loss.numel() + 1).view_as(loss)).sum(), student),
    ]


def check_same(actual: list[Tensor], expected: list[Tensor], relative: float = 1e-12) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        check_close(f"of loss and gradients the {i}.", a, e, relative)


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(kind: str, dtype: torch.dtype) -> None:
    *student, t_hidden, t_weight, t_bias = heads(dtype)
    teacher = teacher_of(kind, *(x if kind == "head" else x.float() for x in (t_hidden, t_weight, t_bias)))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_kd_loss(Head(hidden, weight, bias), teacher, LABELS, ce_weight=0.3, divergence="jsd", chunk=2)

    check_op(loss, student)


@pytest.mark.parametrize("kind", ["head", "bucket"])
@pytest.mark.parametrize("dtype", [FP64, torch.float32])
def test_scale_and_softcap(kind: str, dtype: torch.dtype) -> None:
    *student, t_hidden, t_weight, t_bias = heads(dtype)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, *teacher: Tensor) -> Tensor:
        head = Head(hidden, weight, bias, scale=1.7, softcap=1.5)
        target = teacher_of(kind, *teacher)
        target = target._replace(scale=0.7, softcap=2.0) if isinstance(target, Head) else target
        return linear_kd_loss(head, target, LABELS, ce_weight=0.3, chunk=4)

    value, _ = check_op(loss, student, constants=[t_hidden, t_weight, t_bias])
    if kind == "head":
        by_hand = 1.5 * (1.7 * (student[0] @ student[1].T + student[2]) / 1.5).tanh()
        teacher = 2.0 * (0.7 * (t_hidden @ t_weight.T + t_bias) / 2.0).tanh()
        expected = stkd_loss(by_hand, teacher, LABELS, temperature=1.0, ce_weight=0.3, kd_weight=1.0)
        check_close("loss", value, expected, 1e-6)


def test_options_are_those_of_stkd_loss() -> None:
    tensors = heads()
    logits = tensors[0] @ tensors[1].T + tensors[2], tensors[3] @ tensors[4].T + tensors[5]
    for options in (
        {"decouple": (1.0, 8.0), "temperature": 2.0},
        {"standardize": True, "divergence": "jsd", "beta": 0.3},
        {"scale_by_t2": False, "temperature": 3.0, "divergence": "reverse", "label_smoothing": 0.2},
    ):
        options = {"ce_weight": 0.4, "kd_weight": 0.6, **options}
        actual = distil("head", LABELS, chunk=4, **options)(*tensors)
        check_close("loss", actual, stkd_loss(*logits, LABELS, **{"temperature": 1.0, **options}), 1e-12)


@pytest.mark.parametrize("kind", TEACHERS)
def test_nothing_depends_on_the_chunk_or_on_missing_columns(kind: str) -> None:
    tensors = heads()
    whole = sum_of(kind, tensors, ce_weight=0.3, chunk=TOKENS)
    for chunk in (1, 4, 100, None):
        check_same(sum_of(kind, tensors, ce_weight=0.3, chunk=chunk), whole)
    rows = sum_of(kind, tensors, ce_weight=0.3, chunk=4, reduction="none")
    check_close("mean", rows[0].sum() / 4, whole[0], 1e-12)
    # two heads with different padding, which is far from 0
    padding = [torch.full((n, w), 9.0, dtype=FP64, device=DEVICE) for n, w in ((3, STUDENT), (5, TEACHER))]
    hidden, weight, bias, t_hidden, t_weight, t_bias = tensors
    student = [
        x.clone().requires_grad_()
        for x in (hidden, torch.cat([weight, padding[0]]), torch.cat([bias, padding[0][:, 0]]))
    ]
    teacher = teacher_of(kind, t_hidden, t_weight, t_bias)
    if isinstance(teacher, Head):
        teacher = Head(t_hidden, torch.cat([t_weight, padding[1]]), torch.cat([t_bias, padding[1][:, 0]]))
    elif isinstance(teacher, Tensor):
        teacher = torch.cat([teacher, padding[1][:1, :1].expand(TOKENS, 5)], 1)
    loss = linear_kd_loss(Head(*student), teacher, LABELS, ce_weight=0.3, vocab_size=VOCABULARY)
    d_hidden, d_weight, d_bias = torch.autograd.grad(loss, student)
    assert not d_weight[VOCABULARY:].any()
    assert not d_bias[VOCABULARY:].any()
    check_same([loss, d_hidden, d_weight[:VOCABULARY], d_bias[:VOCABULARY]], whole)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["head", "logits", "bucket", "renormalise_both"])
def test_identical_networks_give_nothing(kind: str, divergence: str) -> None:
    for dtype in (FP64, torch.float32):
        student = heads(dtype)[:3]
        loss, *gradients = sum_of(kind, (*student, *student), divergence=divergence)
        for x in (loss, *gradients):
            assert x.abs().max() < (1e-15 if dtype == FP64 else 1e-6)
        if kind == "head":
            assert not any(x.any() for x in (loss, *gradients))


@pytest.mark.parametrize("kind", TEACHERS)
def test_positions_that_do_not_count(kind: str) -> None:
    """By their label or the mask, whatever they hold: the loss and the gradients of the others alone."""
    counts = LABELS != -100
    tensors = heads()
    few = tuple(x[counts] if x.shape[0] == TOKENS else x for x in tensors)
    expected = sum_of(kind, few, LABELS[counts])
    broken = list(tensors)
    for i in (0, 3):
        broken[i] = torch.where(counts[:, None], tensors[i], math.nan)
    padded = torch.zeros_like(expected[1].new_empty(TOKENS, STUDENT))
    padded[counts] = expected[1]
    expected[1] = padded
    check_same(sum_of(kind, tuple(broken), LABELS), expected)
    check_same(sum_of(kind, tuple(broken), None, mask=counts), expected)
    check_same(sum_of(kind, tuple(broken), LABELS.where(counts, 5), mask=counts), expected)
    check_same(sum_of(kind, tuple(broken), LABELS.where(counts, 0), ignore_index=0), expected)


@pytest.mark.parametrize("kind", TEACHERS)
def test_nothing_left_to_count_is_zero_with_a_graph(kind: str) -> None:
    tensors = heads()
    none = torch.full_like(LABELS, -100)
    for options in ({"target": none}, {"target": none, "denominator": 7}, {"target": None, "mask": none > 0}):
        for x in sum_of(kind, tensors, **options):
            assert not x.any()
    empty = tuple(x[:0] if x.shape[0] == TOKENS else x for x in tensors)
    for reduction in ("mean", "sum", "none"):
        for chunk in (None, 3):
            for x in sum_of(kind, empty, LABELS[:0], reduction=reduction, chunk=chunk):
                assert not x.any()


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("count", [torch.tensor(5), 5.0])
def test_micro_batches_with_one_denominator_are_one_batch(kind: str, count: Tensor | float) -> None:
    tensors = heads()
    whole = sum_of(kind, tensors, denominator=count, ce_weight=0.3)
    check_same(whole[:1], [sum_of(kind, tensors, ce_weight=0.3)[0] * 4 / 5])
    totals = [torch.zeros_like(x) for x in whole]
    for rows in (slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 6)):
        part = tuple(x[rows] if x.shape[0] == TOKENS else x for x in tensors)
        found = sum_of(kind, part, LABELS[rows], denominator=count, ce_weight=0.3)
        totals[1][rows] += found.pop(1)
        for total, x in zip((totals[0], *totals[2:]), found, strict=True):
            total += x
    check_same(totals, whole)


def test_positions_of_any_shape() -> None:
    hidden, weight, bias, *teacher = heads()
    flat = linear_kd_loss(Head(hidden, weight, bias), Head(*teacher), LABELS, reduction="none")
    shaped = Head(hidden.view(2, 3, STUDENT).transpose(0, 1), weight, bias)
    target = Head(teacher[0].view(2, 3, TEACHER).transpose(0, 1), *teacher[1:])
    rows = linear_kd_loss(shaped, target, LABELS.view(2, 3).T, reduction="none")
    assert torch.equal(rows, flat.view(2, 3).T)


def test_module_holds_the_options() -> None:
    hidden, weight, bias, *teacher = heads()
    options = {"temperature": 2.0, "ce_weight": 0.3, "divergence": "skew", "beta": 0.2, "chunk": 3}
    module = LinearKDLoss(**options)
    student, target = Head(hidden, weight, bias), Head(*teacher)
    expected = linear_kd_loss(student, target, LABELS, mask=LABELS != 2, denominator=9, **options)
    assert torch.equal(module(student, target, LABELS, mask=LABELS != 2, denominator=9), expected)
    assert "divergence='skew', beta=0.2" in repr(module)


@pytest.mark.parametrize("kind", ["head", "logits", "bucket"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_contract(kind: str, reduction: str) -> None:
    hidden, *rest = heads(torch.float32)
    teacher = teacher_of(kind, *rest[2:])
    options = {"ce_weight": 0.3, "chunk": 2, "reduction": reduction}
    check_contract(lambda x: linear_kd_loss(Head(x, *rest[:2]), teacher, LABELS, **options), hidden)


@pytest.mark.parametrize(("kind", "reduction"), [("head", "mean"), ("bucket", "none")])
def test_compiles(kind: str, reduction: str) -> None:
    hidden, *rest = heads(torch.float32)
    check_compiled(lambda x: distil(kind, LABELS, ce_weight=0.3, reduction=reduction)(x, *rest), hidden)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_in_inference_mode(reduction: str) -> None:
    """Eager and compiled, after a teacher without the mode too: always that teacher's numbers."""
    tensors = heads(torch.float32)
    tensors[0].requires_grad_()
    with torch.inference_mode():
        inference = [x * 1 for x in tensors[3:]]

    def loss(hidden: Tensor, *rest: Tensor) -> Tensor:
        return distil("head", LABELS, ce_weight=0.3, reduction=reduction)(hidden, *rest)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)  # AOTAutograd decides what is saved
    expected = loss(*tensors)
    upstream = torch.linspace(0.5, 2.0, expected.numel()).view_as(expected)
    (gradient,) = torch.autograd.grad(expected, tensors[:1], upstream)
    for function, teacher in ((loss, inference), (compiled, inference), (compiled, tensors[3:]), (compiled, inference)):
        value = function(*tensors[:3], *teacher)
        check_same([value, *torch.autograd.grad(value, tensors[:1], upstream)], [expected, gradient])


def test_gradients_are_handed_on_in_the_last_backward_pass_alone() -> None:
    """What is done to them after a pass that keeps the graph must not reach the next one."""
    hidden, weight, bias, *teacher = heads()
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_kd_loss(Head(*inputs), Head(*teacher), LABELS, ce_weight=0.3)
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in inputs]
    for times in (1, 2):
        for x in inputs:
            x.grad.zero_()
        loss.backward(retain_graph=times == 1)
        check_same([x.grad for x in inputs], first)


def test_opcheck() -> None:
    hidden, weight, bias, *rest = (x[:4] for x in heads(torch.float32))
    for reduction in ("mean", "none"):
        options = Options(reduction=reduction, d_hidden=True, d_weight=True, d_bias=True)
        teacher = Teacher(*rest)
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        x = LinearKD(*leaves, 1.0, 0.0, teacher, None, None, None, Terms(kl=1.0), options)
        torch.library.opcheck(torch.ops.kdkernels.linear_kd_traced.default, (*flatten(x), True))
