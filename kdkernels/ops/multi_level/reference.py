"""multi_level in plain PyTorch, all temperatures at once. What it computes is in definition.py.

With d = q_t - q_s and m = (q_t + q_s) / 2 a difference of Grams is X + X', X = d m', and its squared norm has the
gradient -4 (X + X') q_s: two products instead of four, and nothing cancels where the networks are close.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import Levels


def forward(x: Levels, need_grad: bool) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x.student, x.teacher)
    rows, classes = x.student.shape
    s, t = x.student.to(dtype), x.teacher.to(dtype)
    if rows == 0:
        return s.new_zeros(()), s.new_zeros(s.shape if need_grad else (0,))
    log_s, log_t = (torch.stack([z / temperature for temperature in x.temperatures]).log_softmax(2) for z in (s, t))
    q_s, q_t = log_s.exp(), log_t.exp()
    d = q_t - q_s
    unsure_rows, unsure_classes = _shares(x, t)
    temperatures, weights = _vector(x.temperatures, s), _vector(x.weights, s) + x.masked_weight * unsure_rows
    loss = (weights * temperatures.square() / rows).dot(_divergences(log_t - log_s, q_s, q_t, d))
    gradient = s.new_empty(0)
    if need_grad:
        gradient = -((weights * temperatures / rows) @ d.flatten(1)).view(rows, classes)
    for weight, dim, size in ((x.batch_weight * unsure_rows, 2, rows), (x.class_weight * unsure_classes, 1, classes)):
        if (x.batch_weight if dim == 2 else x.class_weight) == 0:
            continue
        gram = _gram_difference(d, q_s, dim)
        loss = loss + weight / size * gram.square().sum()
        if need_grad:
            gram *= (-4 * weight / size / temperatures)[:, None, None]
            gradient += _through_softmax(q_s, gram @ q_s if dim == 2 else q_s @ gram)
    return loss, gradient


def _vector(numbers: list[float], like: Tensor) -> Tensor:
    """Without a copy from the host, which would wait for the device."""
    return torch.stack([like.new_full((), number) for number in numbers])


def _shares(x: Levels, t: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows, and of the classes, that are no surer than the quantile."""
    p = t.softmax(1)

    def share(confidence: Tensor) -> Tensor:
        at_most = confidence.kthvalue(int(x.quantile * (len(confidence) - 1)) + 1).values
        return (confidence <= at_most).to(t.dtype).mean()

    return share(p.amax(1)), share(p.sum(0))


def _divergences(log_ratio: Tensor, q_s: Tensor, q_t: Tensor, d: Tensor) -> Tensor:
    """(K,) the sum of KL(q_t || q_s), as that of q_t (r + e^-r - 1), r = log(q_t / q_s): no term is negative."""
    near = log_ratio.abs() < 0.5
    terms = torch.where(near, log_ratio + torch.expm1(-log_ratio), log_ratio) * q_t
    terms -= torch.where(near, 0, d)
    return torch.where(q_t == 0, q_s, terms).sum((1, 2))


def _gram_difference(d: Tensor, q_s: Tensor, dim: int) -> Tensor:
    """q_t q_t' - q_s q_s' (dim 2: of rows) or q_t' q_t - q_s' q_s (dim 1: of classes), for each temperature."""
    middle = q_s + d / 2
    half = d @ middle.mT if dim == 2 else d.mT @ middle
    return half + half.mT


def _through_softmax(q: Tensor, g: Tensor) -> Tensor:
    """The gradient at the logits, summed over the temperatures, whose 1 / T is in g."""
    g *= q
    return g.sum(0) - (q * g.sum(2, keepdim=True)).sum(0)
