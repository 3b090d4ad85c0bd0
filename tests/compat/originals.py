"""What the other libraries' losses are, in plain PyTorch and in our own words: the oracles of the compat tests."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Per position, without T^2; the classes are in dimension 1."""
    log_s, log_t = (torch.log_softmax(z / temperature, 1) for z in (student, teacher))
    return (log_t.exp() * (log_t - log_s)).sum(1)


def distill_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return temperature**2 * kl(student, teacher, temperature).sum() / len(student)


def sp(student: Tensor, teacher: Tensor, norm: int = 2) -> Tensor:
    """The squared distance of the two normalised Gram matrices, summed."""
    grams = []
    for x in (student, teacher):
        k = torch.einsum("id,jd->ij", x.flatten(1), x.flatten(1))
        grams.append(k / torch.linalg.vector_norm(k, norm, 1, keepdim=True).clamp_min(1e-12))
    return (grams[0] - grams[1]).square().sum()


def dkd(
    student: Tensor, teacher: Tensor, labelled: Tensor, alpha: float, beta: float, temperature: float, classes: int = 1
) -> Tensor:
    """labelled: (N, C) bool, ``classes`` of them in each row: one is the published loss, two are mixup's."""
    n = len(student)
    q_s, q_t = (torch.softmax(z / temperature, 1) for z in (student, teacher))
    known, rest = ([q[mask].view(n, -1) for q in (q_s, q_t)] for mask in (labelled, ~labelled))
    known = [torch.cat([k, r.sum(1, keepdim=True)], 1) for k, r in zip(known, rest, strict=True)]
    assert known[0].shape == (n, classes + 1)
    tckd = (known[1] * (known[1] / known[0]).log()).sum()
    rest = [r / r.sum(1, keepdim=True) for r in rest]
    nckd = (rest[1] * (rest[1] / rest[0]).log()).sum()
    return temperature**2 * (alpha * tckd + beta * nckd) / n


def standardised(z: Tensor) -> Tensor:
    deviation = z - z.sum(-1, keepdim=True) / z.shape[-1]
    return deviation / (1e-7 + (deviation.square().sum(-1, keepdim=True) / (z.shape[-1] - 1)).sqrt())
