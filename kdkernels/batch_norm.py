"""Batch normalisation of the losses' heads over the batch of all ranks of a group.

As PyTorch's SyncBatchNorm, which runs on accelerators alone. The modules are those of torch.nn, with a group to set.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ops.checks import compute_dtype


class _Sum(torch.autograd.Function):
    """The sum over the ranks; its gradient is that of the ranks' losses together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class BatchNorm1d(nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, or with ``group`` that of the rows of all ranks."""

    group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        return _over_ranks(self, x, self.group) if self.training and self.group is not None else super().forward(x)


class BatchNorm2d(nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, or with ``group`` that of the maps of all ranks."""

    group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        return _over_ranks(self, x, self.group) if self.training and self.group is not None else super().forward(x)


def set_group(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """The group of all parts of a module that can have one; None for one process."""
    for part in module.modules():
        if hasattr(type(part), "group"):
            setattr(part, "group", group)  # noqa: B010 (mypy takes a module's attributes for tensors)


def _over_ranks(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    positions = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    y = x.to(compute_dtype(x))
    count = y.new_tensor([y.numel() / y.shape[1]])
    sums = _Sum.apply(torch.cat([y.sum(positions), count]), group)
    count = sums[-1]
    mean = sums[:-1] / count
    y = y - mean.view(shape)
    variance = _Sum.apply(y.square().sum(positions), group) / count
    with torch.no_grad():
        _track(norm, mean, variance * count / (count - 1))
    y = y * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y.to(x.dtype)


def _track(norm: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """The running statistics, as torch.nn keeps them."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)
