"""Whole losses as a training step calls them: every stage of resnet8x4 taught by resnet32x4, CIFAR-100's logits, MLKD's
correlation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdkernels

from . import published
from .bench_gram import RESNET8X4
from .cases import DEVICE, Case, Gain, Inputs, Loss, feature_case
from .under_pytest import PROVIDERS, run_case


def correlation_case(images: int, width: int, views: int = 4) -> Case:
    def inputs() -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(0)
        rows = [torch.randn(views * images, width, device=DEVICE, generator=generator) for _ in range(2)]
        return [rows[0].requires_grad_()], [rows[1]]

    size = images * views * width
    return Case(
        group="losses",
        name=f"mlkd correlation {images} images x {views} views x {width}",
        ours=kdkernels.correlation_loss,
        published=published.correlation,
        inputs=inputs,
        gain="algebra",  # a product, not d broadcast copies of (V - 1) B x B
        bytes=4 * size * 4,  # read both; read the student's, write its gradient
        flops=4 * 2 * (views - 1) * images**2 * width,  # two products forward, two backward
    )


def relational_case(name: str, ours: Loss, published_loss: Loss, rows: int, width: int, gain: Gain = "algebra") -> Case:
    """A loss of two (B, D) features, both D wide."""

    def inputs() -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(0)
        student, teacher = (torch.randn(rows, width, device=DEVICE, generator=generator) for _ in range(2))
        return [student.requires_grad_()], [teacher]

    return Case(
        group="losses",
        name=f"{name} {rows}x{width}",
        ours=ours,
        published=published_loss,
        inputs=inputs,
        gain=gain,
        bytes=4 * rows * width * 4,  # read both; read the student's, write its gradient
        flops=4 * rows**2 * width,  # two symmetric products forward, one backward
    )


WRN = [(64, 32, 32, 32), (64, 64, 16, 16), (64, 128, 8, 8)]
CASES = [
    feature_case("losses", "sp resnet8x4, 3 stages", kdkernels.sp_loss, published.sp, RESNET8X4, products=1),
    feature_case("losses", "sp wrn16-2, 3 stages", kdkernels.sp_loss, published.sp, WRN, products=1),
    feature_case("losses", "amd resnet8x4, 3 stages", kdkernels.amd_loss, published.amd, RESNET8X4),
    feature_case("losses", "amd wrn16-2, 3 stages", kdkernels.amd_loss, published.amd, WRN),
    correlation_case(16, 128),
    correlation_case(64, 512),
    relational_case("rkd", kdkernels.rkd_loss, published.rkd, 64, 64),
    relational_case("rkd", kdkernels.rkd_loss, published.rkd, 128, 512),
    relational_case("pkt", kdkernels.pkt_loss, published.pkt, 64, 512, "kernel"),
    relational_case("pkt", kdkernels.pkt_loss, published.pkt, 256, 2048, "kernel"),
    relational_case("pkt", kdkernels.pkt_loss, published.pkt, 256, 64, "kernel"),
    relational_case("cc", kdkernels.cc_loss, published.cc, 256, 64, "kernel"),
    relational_case("cc", kdkernels.cc_loss, published.cc, 64, 512, "kernel"),
    relational_case("cc", kdkernels.cc_loss, published.cc, 256, 2048, "kernel"),
    relational_case("irg", kdkernels.irg_loss, published.irg, 64, 512, "kernel"),
    relational_case("irg", kdkernels.irg_loss, published.irg, 256, 2048, "kernel"),
    relational_case(
        "correlation of neighbours",
        kdkernels.neighbour_correlation_loss,
        published.neighbour_correlation,
        64,
        2048,
        "kernel",
    ),
    relational_case(
        "correlation of neighbours",
        kdkernels.neighbour_correlation_loss,
        published.neighbour_correlation,
        256,
        512,
        "kernel",
    ),
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_losses(benchmark: Any, case: Case, provider: str) -> None:
    run_case(benchmark, case, provider)
