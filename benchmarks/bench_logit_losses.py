"""The losses on rows of logits beside KD: NKD, DIST, MLLD, and CWD, whose rows are the pixels of a channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdkernels

from . import published
from .cases import DEVICE, Case, Gain, Inputs, Loss, logits
from .under_pytest import PROVIDERS, run_case

LOSSES: dict[str, tuple[Loss, Loss, int]] = {
    "nkd": (kdkernels.nkd_loss, published.nkd, 1),
    "dist": (kdkernels.dist_loss, published.dist, 0),
    "mlld": (kdkernels.mlld_loss, published.mlld, 0),
}


def case(name: str, rows: int, classes: int, gain: Gain = "kernel") -> Case:
    ours, theirs, labels = LOSSES[name]
    products = 5 * 4 * 2 * rows * classes * (rows + classes) if name == "mlld" else 0
    return Case(
        group="logits",
        name=f"{name} {rows}x{classes}",
        ours=ours,
        published=theirs,
        inputs=logits(rows, classes, torch.float32, labels),
        gain=gain,
        bytes=5 * rows * classes * 4,  # read s, t; read s, t and write ds
        flops=products,  # at five temperatures, of two shapes: one product forward and one backward
        rows_are_independent=name == "nkd",
    )


def cwd_case(*shape: int) -> Case:
    def inputs() -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(0)
        pair = [2 * torch.randn(*shape, device=DEVICE, generator=generator) for _ in range(2)]
        return [pair[0].requires_grad_()], [pair[1]]

    return Case(
        group="logits",
        name=f"cwd {'x'.join(map(str, shape))}",
        ours=kdkernels.cwd_loss,
        published=published.cwd,
        inputs=inputs,
        gain="kernel",
        bytes=5 * torch.Size(shape).numel() * 4,
        rows_are_independent=True,
    )


SHAPES = [(64, 100), (256, 1000), (1024, 1000)]
CASES = [
    *(case("nkd", *shape) for shape in SHAPES),
    *(case("dist", *shape) for shape in SHAPES),
    *(case("mlld", *shape, gain="algebra") for shape in SHAPES),
    cwd_case(8, 19, 64, 64),
    cwd_case(16, 150, 64, 64),
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_logit_losses(benchmark: Any, case: Case, provider: str) -> None:
    run_case(benchmark, case, provider)
