"""The cross entropy of a chunk whose columns may lie on several ranks, for the row passes in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .columns import Columns, Softmax
from .record import LinearKD


def cross_entropy(x: LinearKD, hard: Softmax, at_label: Tensor, mean: Tensor) -> Tensor:
    """(n, 1) from the softmax at temperature 1, the label's logit and the logits' mean."""
    loss = hard.log_z - (at_label - hard.top)
    e = x.options.smoothing
    return (1 - e) * loss + e * (hard.log_z - (mean - hard.top)) if e else loss


def cross_entropy_gradient(
    x: LinearKD, z: Tensor, hard: Softmax, target: Tensor, columns: Columns, factor: Tensor
) -> Tensor:
    """factor (p - y) in z's memory."""
    e = x.options.smoothing
    z.sub_(hard.top).exp_().mul_(factor * (-hard.log_z).exp())
    if e:
        z.sub_(factor * (e / columns.total))
    place, here = columns.find(target[:, None])
    return z.scatter_add_(1, place, ((e - 1) * factor).masked_fill(~here, 0))


def is_label(target: Tensor, columns: Columns) -> Tensor:
    """(n, 1) whether the label is in range."""
    return ((target >= 0) & (target < columns.total))[:, None]


def kept(x: Tensor, valid: Tensor, keep: Tensor | None) -> Tensor:
    """Row values (n, 1): NaN where a row is invalid, 0 where it does not count."""
    x = torch.where(valid, x, math.nan)
    return x if keep is None else x.masked_fill(~keep[:, None], 0)
