"""energy: AT on one layer pair and on all stages, FT's factor term."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

import kdkernels

from . import published
from .bench_gram import BF16, FP16, RESNET8X4
from .bench_losses import WRN
from .cases import Case, feature_case, layer_pair, slow_on_cpu
from .under_pytest import PROVIDERS, run_case

case = partial(layer_pair, "energy", "at", kdkernels.at_loss, published.at, gain="kernel")

CASES = [
    feature_case("energy", "at resnet8x4, 3 stages", kdkernels.at_loss, published.at, RESNET8X4, gain="kernel"),
    feature_case("energy", "at wrn16-2, 3 stages", kdkernels.at_loss, published.at, WRN, gain="kernel"),
    *(case("resnet8x4", shape) for shape in RESNET8X4),
    case("resnet8x4", RESNET8X4[2], dtype=BF16),
    case("resnet8x4", RESNET8X4[2], dtype=FP16, gain=slow_on_cpu("kernel")),
    case("resnet18 of resnet50", (256, 512, 7, 7), (256, 2048, 7, 7)),
    layer_pair("energy", "ft", kdkernels.ft_loss, published.ft, "factors of resnet8x4", RESNET8X4[2], gain="kernel"),
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_energy(benchmark: Any, case: Case, provider: str) -> None:
    run_case(benchmark, case, provider)
