"""softmax_kl: KD, with mixed labels (STKD), decoupled (DKD), from CIFAR's logits to a language model's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels

from . import published
from .cases import Case, Gain, Loss, logits, slow_on_cpu
from .under_pytest import PROVIDERS, run_case

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def liger_kd() -> Loss | None:
    """Liger-Kernel's KL with PyTorch's softmaxes around it, the same function as kd_loss."""
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError:
        return None
    kl = LigerKLDIVLoss(reduction="batchmean")

    def loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
        q_s, q_t = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
        return kl(q_s, q_t) * temperature**2

    return loss


LOSSES: dict[str, tuple[Loss, Loss, int]] = {
    "kd": (kdkernels.kd_loss, published.kd, 0),
    "kd reverse": (partial(kdkernels.kd_loss, divergence="reverse"), published.kd_reverse, 0),
    "kd jsd": (partial(kdkernels.kd_loss, divergence="jsd"), published.kd_jsd, 0),
    "kd standardized": (partial(kdkernels.kd_loss, standardize=True), published.kd_standardized, 0),
    "stkd": (kdkernels.stkd_loss, published.stkd, 2),
    "dkd": (partial(kdkernels.stkd_loss, ce_weight=0.0, kd_weight=1.0, decouple=(1.0, 8.0)), published.dkd, 1),
}


def case(name: str, rows: int, classes: int, dtype: torch.dtype = FP32, gain: Gain = "kernel") -> Case:
    ours, theirs, labels = LOSSES[name]
    return Case(
        group="softmax_kl",
        name=f"{name} {rows}x{classes}",
        ours=ours,
        published=theirs,
        inputs=logits(rows, classes, dtype, labels),
        gain=gain,
        bytes=5 * rows * classes * dtype.itemsize,  # read s, t; read s, t and write ds
        dtype=dtype,
        rows_are_independent=True,
        liger=liger_kd() if name == "kd" else None,
    )


CASES = [
    case("kd", 64, 100),
    case("kd", 256, 1000),
    case("kd", 1024, 1000),
    case("kd", 4096, 1000),
    case("kd", 4096, 1000, BF16),
    case("kd", 4096, 1000, FP16),
    case("kd", 8192, 32000, gain=slow_on_cpu("kernel")),
    case("kd reverse", 64, 100),
    case("kd reverse", 1024, 1000),
    case("kd jsd", 64, 100),
    case("kd jsd", 1024, 1000),
    case("kd standardized", 64, 100),
    case("kd standardized", 1024, 1000),
    case("stkd", 64, 100),
    case("stkd", 256, 1000),
    case("stkd", 1024, 1000),
    case("stkd", 4096, 1000),
    case("dkd", 64, 100),
    case("dkd", 1024, 1000),
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_softmax_kl(benchmark: Any, case: Case, provider: str) -> None:
    run_case(benchmark, case, provider)
