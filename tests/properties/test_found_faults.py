"""Faults that the properties found, one case each as it was shrunk."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from checking import DEVICE, backends_under_test
from judging import Loss, judge
from torch import Tensor

import kdkernels
from kdkernels import dist_loss, kd_loss, mlld_loss, nkd_loss

pytestmark = pytest.mark.skipif("native" not in backends_under_test() or DEVICE != "cpu", reason="faults of the CPU")


def rows(*numbers: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([numbers], dtype=dtype)


def nkd(s: Tensor, t: Tensor) -> Tensor:
    return nkd_loss(s, t, torch.tensor([0]), temperature=4.0, gamma=1.0)


def standardised(s: Tensor, t: Tensor) -> Tensor:
    return kd_loss(s, t, temperature=20.0, divergence="skew", standardize=True)


def levels(s: Tensor, t: Tensor) -> Tensor:
    return mlld_loss(s, t, temperatures=[20.0], strong_temperatures=[], batch_weight=0.0, class_weight=0.0)


def maps(s: Tensor, t: Tensor) -> Tensor:
    """Of one channel, its pixels in a row."""
    return kdkernels.nst_loss(s[:, None, None], t[:, None, None])


CONSTANT_CLASS = dist_loss, torch.tensor([[-25.0, 0], [-26, 0]]), torch.tensor([[-3.0, 3], [-3, 3]]), {"natural": 1.0}
FAULTS: dict[str, tuple[str, Loss, Tensor, Tensor, dict[str, Any]]] = {
    "nkd of -inf alone": ("native", nkd, rows(0.3, 0.5), rows(1, -math.inf), {}),
    "mlld's gradient cancels": ("reference", levels, rows(1e-2, 0, 0, 0, 0), rows(0, 0, 0, 0, 0), {}),
    "nst of large maps": ("native", maps, rows(0, 0), rows(1e28, 2e28), {"overflow": True}),
    "dist of a teacher's constant class": ("native", *CONSTANT_CLASS),
    "the same in plain pytorch": ("reference", *CONSTANT_CLASS),
    "standardised logits whose squares overflow": (
        "reference",
        standardised,
        rows(1.541e20, -0.29343e20, 0),
        rows(-2.1788e20, 0.56843e20, 0),
        {},
    ),
    # the gradient is the rest of terms of T / std: two values' standardised logits have no freedom
    "a teacher without spread": (
        "native",
        standardised,
        rows(0, -16376, 0, 0, 0),
        rows(0, 0, 0, 0, 0),
        {"natural": 2 * 20 / 7323},
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault(fault: tuple[str, Loss, Tensor, Tensor, dict[str, Any]]) -> None:
    backend, loss, student, teacher, options = fault
    with kdkernels.use_backend(backend):
        judge(loss, [student], [teacher], **options)
