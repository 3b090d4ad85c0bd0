"""angular_margin: AMD on one layer pair, from the stages of CIFAR networks to ResNet-50's last one at batch 256."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

import kdkernels

from . import published
from .bench_gram import BF16, FP16, RESNET8X4
from .cases import Case, layer_pair, slow_on_cpu
from .under_pytest import PROVIDERS, run_case

case = partial(layer_pair, "angular_margin", "amd", kdkernels.amd_loss, published.amd)

CASES = [
    *(case("resnet8x4", shape) for shape in RESNET8X4),
    case("resnet8x4", RESNET8X4[2], dtype=BF16),
    case("resnet8x4", RESNET8X4[2], dtype=FP16, gain=slow_on_cpu("algebra")),
    case("wrn16-2", (64, 32, 32, 32)),
    case("wrn16-2", (64, 128, 8, 8)),
    case("resnet18 of resnet50", (256, 512, 7, 7), (256, 2048, 7, 7)),
    case("resnet50", (256, 2048, 7, 7)),
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_angular_margin(benchmark: Any, case: Case, provider: str) -> None:
    run_case(benchmark, case, provider)
