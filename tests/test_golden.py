"""The numbers that the papers' own code gave, in fp64, and in fp32 on each backend."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checking import DEVICE, refused, wave
from torch import Tensor

import kdkernels

ROWS = {row["name"]: row for row in json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())}
NAMES = [name for name in ROWS if not name.startswith("mlkd")]
MLKD_NAMES = [name for name in ROWS if name.startswith("mlkd")]


def inputs(text: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pair = []
    for name in ("student", "teacher"):
        shape, seed, scale = re.search(rf"{name}=wave\(\(([\d,]+)\),([\d.]+),([\d.]+)\)", text).groups()
        x = wave([int(n) for n in shape.split(",")], float(seed), float(scale), dtype)
        pair.append(x.clamp(min=0) if "clamped at 0" in text else x)
    return pair[0], pair[1]


def mixed_labels(text: str) -> tuple[Tensor, Tensor, float]:
    labels = []
    n = int(re.search(r"wave\(\((\d+),", text)[1])
    for name in ("target", "target_b"):
        slope, offset, modulus = map(int, re.search(rf"{name}\[i\]=\((\d+)i\+(\d+)\)%(\d+)", text).groups())
        labels.append((slope * torch.arange(n, device=DEVICE) + offset) % modulus)
    return labels[0], labels[1], float(re.search(r"lam=([\d.]+)", text)[1])


def loss_of(name: str, text: str) -> Callable[[Tensor, Tensor], Tensor]:
    kind = name.split("[")[0]
    if kind in ("sp", "sp_l1"):
        return lambda s, t: kdkernels.sp_loss(s, t, row_norm="l1" if kind == "sp_l1" else "l2")
    if kind in ("amd", "amd_local"):
        return lambda s, t: kdkernels.amd_loss(s, t, local_weight=0.2 if kind == "amd_local" else 0.0)
    temperature = float(re.search(r"temperature=([\d.]+)", text)[1])
    if kind == "kd":
        return lambda s, t: kdkernels.kd_loss(s, t, temperature=temperature)
    ce_weight, kd_weight = (1.0, 0.0) if kind == "mixed_ce" else (0.1, 0.9)
    labels = mixed_labels(text)
    return lambda s, t: kdkernels.stkd_loss(
        s, t, *labels, temperature=temperature, ce_weight=ce_weight, kd_weight=kd_weight
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("backend")
def test_golden_row(name: str, dtype: torch.dtype) -> None:
    row = ROWS[name]
    tolerance = {"rel": 1e-9, "abs": 1e-12} if dtype == torch.float64 else {"rel": 1e-5, "abs": 1e-7}
    student, teacher = inputs(row["inputs"], dtype)
    student.requires_grad_()
    if refused(loss_of(name, row["inputs"]), student, teacher):
        return
    loss = loss_of(name, row["inputs"])(student, teacher)
    loss.backward()
    gradient = student.grad.double()
    assert loss.item() == pytest.approx(row["loss"], **tolerance)
    assert gradient.norm().item() == pytest.approx(row["grad_norm"][0], **tolerance)
    fingerprint = (gradient * wave(gradient.shape, 0.5, 1)).sum().item()
    # in fp32 the sum over a gradient cancels: what counts is its error beside the gradient's own size
    size = row["grad_norm"][0] * wave(gradient.shape, 0.5, 1).norm().item()
    assert fingerprint == pytest.approx(
        row["grad_dot_wave"][0],
        rel=tolerance["rel"],
        abs=tolerance["abs"] + (1e-6 * size if dtype == torch.float32 else 0),
    )


@pytest.mark.parametrize("name", MLKD_NAMES)
@pytest.mark.usefixtures("backend")
def test_golden_mlkd_row(name: str) -> None:
    row, text, n = ROWS[name], ROWS[name]["inputs"], int(re.search(r"wave\(\((\d+),", ROWS[name]["inputs"])[1])
    student, teacher = inputs(text, torch.float64)
    projected = re.search(r"already projected: wave\(\(([\d,]+)\),([\d.]+),([\d.]+)\)", text)
    if projected:
        student = wave([int(k) for k in projected[1].split(",")], float(projected[2]), float(projected[3]))
    slope, offset, modulus = map(int, re.search(r"label of image i=\((\d+)i\+(\d+)\)%(\d+)", text).groups())
    labels = ((slope * torch.arange(n // 4, device=DEVICE) + offset) % modulus).repeat_interleave(4)
    leaves = [student.requires_grad_(), teacher.requires_grad_()]
    if name.startswith("mlkd_sup"):
        loss = kdkernels.supervised_contrastive_loss(*leaves, labels)
    else:
        term = kdkernels.correlation_loss if name.startswith("mlkd_corr") else kdkernels.alignment_loss
        loss, leaves = term(*leaves), leaves[:1]
        teacher.requires_grad_(False)
    assert loss.item() == pytest.approx(row["loss"], rel=1e-9, abs=1e-12)
    gradients = torch.autograd.grad(loss, leaves)
    assert len(gradients) == len(row["grad_norm"])
    for gradient, norm, dot in zip(gradients, row["grad_norm"], row["grad_dot_wave"], strict=True):
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-9, abs=1e-12)
        assert (gradient * wave(gradient.shape, 0.5, 1)).sum().item() == pytest.approx(dot, rel=1e-9, abs=1e-12)


AMD_TABLE = {  # H, W: global loss, with quadrants, gradient norm of each (specification of the loss, fp64)
    (4, 4): (2.973081868375e-03, 3.250168084694e-03, 7.486695671839e-03, 8.729806380658e-03),
    (7, 7): (1.156996642891e-04, 1.463910062843e-04, 1.674046940062e-04, 2.272602072172e-04),
    (8, 6): (1.519245107407e-04, 1.861842259198e-04, 1.979310303854e-04, 2.555523132198e-04),
}


@pytest.mark.parametrize("size", list(AMD_TABLE))
def test_amd_table(size: tuple[int, int]) -> None:
    b, c, i, j = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64, device=DEVICE) for n in (2, 5, *size)), indexing="ij"
    )
    student = torch.sin(0.7 * b + 1.3 * c + 0.31 * i + 0.17 * j)[:, :3].requires_grad_()
    teacher = torch.cos(0.5 * b + 0.9 * c + 0.23 * i + 0.41 * j)
    for k, local_weight in enumerate((0.0, 0.2)):
        loss = kdkernels.amd_loss(student, teacher, local_weight=local_weight)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == pytest.approx(AMD_TABLE[size][k], rel=1e-9)
        assert gradient.norm().item() == pytest.approx(AMD_TABLE[size][2 + k], rel=1e-9)
