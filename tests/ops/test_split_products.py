"""fp32 products as three tf32 ones, as tensor cores make them: an emulation, for no interpreter shows their rounding.

A number is the sum of two of tf32, big and small; small a big b', big a small b' and big a big b' go into one
accumulator, 8 columns at a time, which is cut to fp32 after each; blocks of 32 columns are added in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checking import TOLERANCES
from torch import Tensor

BLOCK, STEP = 32, 8  # columns of a block of the kernels in fp32, and of an instruction


def tf32(x: Tensor) -> Tensor:
    """To 10 bits behind the point, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def cut(x: Tensor) -> Tensor:
    """fp64 to fp32 towards zero."""
    y = x.float()
    over = y.double().abs() > x.abs()
    return torch.where(over, torch.nextafter(y, torch.zeros_like(y)), y)


def split_gram(q: Tensor) -> Tensor:
    big = tf32(q)
    small = tf32(q - big)
    total = torch.zeros(len(q), len(q))
    for start in range(0, q.shape[1], BLOCK):
        part = torch.zeros_like(total)
        for a, b in ((small, big), (big, small), (big, big)):
            for k in range(start, min(start + BLOCK, q.shape[1]), STEP):
                product = a[:, k : k + STEP].double() @ b[:, k : k + STEP].double().T
                part = cut(part.double() + product)
        total = total + part
    return total


def loss_and_gradient(k_s: Tensor, k_t: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """SP's, in fp64, of the student's Gram matrix as a leaf, and the gradient by q."""
    k = k_s.double().requires_grad_()
    g_s, g_t = (torch.nn.functional.normalize(x) for x in (k, k_t.double()))
    loss = (g_s - g_t).square().sum()
    (h,) = torch.autograd.grad(loss, k)
    return loss.detach(), (h + h.T) @ q.double()


def one_sum(q: Tensor) -> Tensor:
    """Each number as one chain of fused multiply-adds in fp32."""
    total = torch.zeros(len(q), len(q))
    for column in q.double().T:
        total = (total.double() + column[:, None] * column).float()
    return total


@pytest.mark.parametrize(
    ("columns", "positive", "apart", "limit"),
    [
        (4096, False, 1.0, 1e-5),
        (4096, True, 1.0, 1e-5),
        (1024, False, 0.1, 1e-5),
        (1024, True, 0.3, 1e-5),
        (2048, True, 0.1, 5e-5),  # Grams that differ by a thousandth
    ],
)
def test_better_than_one_sum_in_fp32(columns: int, positive: bool, apart: float, limit: float) -> None:
    """Also where the networks' Grams nearly agree."""
    generator = torch.Generator().manual_seed(0)
    student, other = torch.randn(2, 8, columns, generator=generator)
    teacher = student + apart * other
    if positive:
        student, teacher = student.relu(), teacher.relu()
    loss, gradient = loss_and_gradient(
        student.double() @ student.double().T, teacher.double() @ teacher.double().T, student
    )

    def error(gram: Callable[[Tensor], Tensor]) -> float:
        found, slope = loss_and_gradient(gram(student), gram(teacher), student)
        assert abs(found / loss - 1) < TOLERANCES[torch.float32].loss
        return ((slope - gradient).norm() / gradient.norm()).item()

    assert error(split_gram) < min(limit, error(one_sum))
