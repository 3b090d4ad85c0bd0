"""linear_kd_loss against the definition on whole logits, in fp64: every divergence, teacher and rest; and its options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import DEVICE, backends_under_test, by_definition, check_close, check_compiled, check_contract, check_op, wave
from torch import Tensor

from kdkernels import Head, LinearKDLoss, TopK, linear_kd_loss, stkd_loss, use_backend
from kdkernels.heads import RESTS
from kdkernels.kd_loss import DIVERGENCES

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


def is_defined(kind: str, divergence: str) -> bool:
    return (kind, divergence) != ("renormalise", "reverse")


def distil(kind: str, target: Tensor | None = None, temperature: float = 1.0, **options: Any) -> Callable[..., Tensor]:
    """The loss of the three student's tensors and the teacher's."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        teacher = teacher_of(kind, *rest, temperature=temperature)
        return linear_kd_loss(Head(hidden, weight, bias), teacher, target, temperature=temperature, **options)

    return loss


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", TEACHERS)
def test_meets_the_definition(kind: str, divergence: str) -> None:
    if not is_defined(kind, divergence):
        pytest.skip("is infinite, and refused")
    *student, t_hidden, t_weight, t_bias = heads()
    options = {"divergence": divergence, "ce_weight": 0.3, "label_smoothing": 0.1, "chunk": 2, "temperature": 1.7}
    for backend in backends_under_test():
        with use_backend(backend):
            for dtype in (FP64, torch.float32):
                tensors = [x.to(dtype) for x in student]
                constants = [x.to(dtype) for x in (t_hidden, t_weight, t_bias)]
                check_op(distil(kind, LABELS, **options), tensors, constants=constants)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", TEACHERS)
def test_gradcheck(kind: str, divergence: str) -> None:
    if not is_defined(kind, divergence):
        pytest.skip("is infinite, and refused")
    tensors = heads()
    student = [x[:4].clone().requires_grad_() for x in tensors[:3]]
    teacher = [x[:4] for x in tensors[3:]]
    loss = distil(kind, divergence=divergence, temperature=1.7, chunk=3)
    torch.autograd.gradcheck(lambda *x: loss(*x, *teacher), student, fast_mode=True)
