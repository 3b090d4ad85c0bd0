"""Every loss as a function of two tensors (N, 12), for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels import Head, linear_kd_loss, stkd_loss

CLASSES = 12
Loss = Callable[[Tensor, Tensor], Tensor]


def maps(x: Tensor) -> Tensor:
    return x.view(-1, 3, 2, 2)


def labels(x: Tensor, classes: int = 3) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) % classes


def mixed(s: Tensor, t: Tensor) -> Tensor:
    a = labels(s)
    return stkd_loss(s, t, a, (a + 1) % 3, 0.4, decouple=(1.0, 8.0), label_smoothing=0.1)


def corsd(s: Tensor, t: Tensor, **options: Any) -> Tensor:
    logits, relations = torch.stack([s, s * s]), torch.stack([s[:, 0], s[:, 1]]).sigmoid()
    return kdkernels.corsd_loss(relations, 1 - relations, logits, logits + t, labels(s), labels(s) + 1, **options)


def linear(s: Tensor, t: Tensor, **options: Any) -> Tensor:
    heads = Head(s, t[:1].expand(CLASSES, -1)), Head(t, 2 * t[:1].expand(CLASSES, -1))
    return linear_kd_loss(*heads, labels(s), ce_weight=0.5, chunk=4, **options)


LOSSES: dict[str, Loss] = {
    "kd": kdkernels.kd_loss,
    "kd skew": lambda s, t: kdkernels.kd_loss(s, t, divergence="skew", standardize=True),
    "stkd": lambda s, t: stkd_loss(s, t, labels(s)),
    "stkd mixed": mixed,
    "sp": lambda s, t: kdkernels.sp_loss([s, s * s], [t, t]),
    "amd": lambda s, t: kdkernels.amd_loss(maps(s), maps(t), local_weight=0.2),
    "amd area": lambda s, t: kdkernels.amd_loss(maps(s), maps(t), layer_weights="area"),
    "correlation": lambda s, t: kdkernels.correlation_loss(s, t, views=1),
    "alignment": kdkernels.alignment_loss,
    "supervised": lambda s, t: kdkernels.supervised_contrastive_loss(s, t, labels(s)),
    "mlkd": lambda s, t: kdkernels.mlkd_loss(s, t, labels(s), views=1),
    "corsd": corsd,
    "rkd": kdkernels.rkd_loss,
    "pkt": kdkernels.pkt_loss,
    "cc": kdkernels.cc_loss,
    "irg": kdkernels.irg_loss,
    "neighbours": kdkernels.neighbour_correlation_loss,
    "at": lambda s, t: kdkernels.at_loss(maps(s), maps(t)),
    "ft": lambda s, t: kdkernels.ft_loss(maps(s), maps(t)),
    "nst": lambda s, t: kdkernels.nst_loss(maps(s), maps(t)),
    "fsp": lambda s, t: kdkernels.fsp_loss([maps(s)] * 2, [maps(t)] * 2),
    "ickd": lambda s, t: kdkernels.ickd_loss(maps(s), maps(t)),
    "nkd": lambda s, t: kdkernels.nkd_loss(s, t, labels(s)),
    "dist": kdkernels.dist_loss,
    "mlld": lambda s, t: kdkernels.mlld_loss(s, t, s.flip(0), t.flip(0)),
    "cwd": lambda s, t: kdkernels.cwd_loss(maps(s), maps(t)),
    "linear_kd": linear,
}
