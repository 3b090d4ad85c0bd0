"""What the parts of softmax_kl's reference share: a row's labels, and sums that keep their digits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .op import Labels


class RowLabels(NamedTuple):
    """Up to two labels per row, (N, 1) each, with their weights; ``keep`` is False on ignored rows."""

    a: Tensor
    b: Tensor
    weight_a: Tensor
    weight_b: Tensor
    keep: Tensor
    valid: Tensor


def read_labels(labels: Labels, classes: int, dtype: torch.dtype) -> RowLabels | None:
    """None without labels and with dense ones."""
    if labels.target is None or labels.dense:
        return None
    a, b = labels.target, labels.target if labels.mixed is None else labels.mixed
    keep = (a != labels.ignore_index) & (b != labels.ignore_index)
    valid = (a >= 0) & (a < classes) & (b >= 0) & (b < classes)
    weight_a = torch.ones((), dtype=dtype, device=a.device) if labels.lam is None else labels.lam.to(dtype)
    weight_a = weight_a.expand(a.shape)
    a, b = a.clamp(0, classes - 1), b.clamp(0, classes - 1)
    return RowLabels(a[:, None], b[:, None], weight_a[:, None], 1 - weight_a[:, None], keep[:, None], valid[:, None])


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, where a weight of 0 means 0 even beside an infinity."""
    return torch.where(weight == 0, torch.zeros_like(value), weight * value)


def bregman(delta: Tensor, qs: Tensor, qt: Tensor) -> Tensor:
    """sum_k of q_t delta - q_t + q_s, delta = log(q_t / q_s): the KL as a sum of terms that are all positive."""
    small = delta.abs() < (0.25 if delta.dtype == torch.float32 else 0.02)
    # delta + expm1(-delta) by its series
    series = 1 / 6 - delta * (1 / 24 - delta * (1 / 120 - delta * (1 / 720 - delta / 5040)))
    terms = torch.where(small, qt * delta.square() * (0.5 - delta * series), qt * (delta - 1) + qs)
    return torch.where(qt == 0, qs, terms).sum(1, keepdim=True)
