"""channel_gram: NST, ICKD and FSP, whose published NST and FSP broadcast to (B, C, C, H W)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

import kdkernels

from . import published
from .bench_gram import RESNET8X4
from .bench_losses import WRN
from .cases import Case, feature_case, layer_pair
from .under_pytest import PROVIDERS, run_case

nst = partial(layer_pair, "channel_gram", "nst", kdkernels.nst_loss, published.nst)
ickd = partial(layer_pair, "channel_gram", "ickd", kdkernels.ickd_loss, published.ickd, gain="kernel")


def fsp(network: str, shapes: Sequence[Sequence[int]]) -> Case:
    found = feature_case("channel_gram", f"fsp {network}, 3 stages", kdkernels.fsp_loss, published.nst, shapes)
    return dataclasses.replace(found, published=published.fsp)


CASES = [
    nst("resnet8x4", RESNET8X4[2]),
    nst("wrn16-2", (64, 128, 8, 8)),
    nst("wrn16-2", (64, 64, 16, 16)),
    ickd("resnet8x4", RESNET8X4[2]),
    ickd("wrn16-2", (64, 128, 8, 8)),
    ickd("resnet18", (64, 512, 7, 7)),
    fsp("resnet8x4", RESNET8X4),
    fsp("wrn16-2", WRN),
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_channel_gram(benchmark: Any, case: Case, provider: str) -> None:
    run_case(benchmark, case, provider)
