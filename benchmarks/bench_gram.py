"""gram: SP on one layer pair, from the stages of CIFAR networks to ResNet-50's last one at batch 256."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import kdkernels

from . import published
from .cases import Case, layer_pair, slow_on_cpu
from .under_pytest import PROVIDERS, run_case

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


case = partial(layer_pair, "gram", "sp", kdkernels.sp_loss, published.sp, products=1)

RESNET8X4 = [(64, 64, 32, 32), (64, 128, 16, 16), (64, 256, 8, 8)]  # resnet32x4's stages have the same shapes
CASES = [
    *(case("resnet8x4", shape) for shape in RESNET8X4),
    case("resnet8x4", RESNET8X4[2], dtype=BF16),
    case("resnet8x4", RESNET8X4[2], dtype=FP16, gain=slow_on_cpu("algebra")),
    case("wrn16-2", (64, 128, 8, 8)),  # wrn40-2 likewise
    case("resnet18 of resnet50", (256, 512, 7, 7), (256, 2048, 7, 7)),
    case("resnet50", (256, 2048, 7, 7)),
    case("resnet50", (256, 2048, 7, 7), dtype=BF16),
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_gram(benchmark: Any, case: Case, provider: str) -> None:
    run_case(benchmark, case, provider)
