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


def check_row(name: str, loss_fn: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Loss and both gradient fingerprints: to 1e-9 in fp64, to 1e-5 in fp32."""
    row, double = ROWS[name], leaves[0].dtype == torch.float64
    relative, absolute = (1e-9, 1e-12) if double else (1e-5, 1e-7)
    loss = loss_fn(*leaves)
    assert loss.item() == pytest.approx(row["loss"], rel=relative, abs=absolute)
    gradients = torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])
    assert len(gradients) == len(row["grad_norm"])
    for gradient, norm, dot in zip(gradients, row["grad_norm"], row["grad_dot_wave"], strict=True):
        along = wave(gradient.shape, 0.5, 1)
        assert gradient.double().norm().item() == pytest.approx(norm, rel=relative, abs=absolute)
        # in fp32 the sum over a gradient cancels: what counts is its error beside the gradient's own size
        slack = absolute if double else absolute + 1e-6 * norm * along.norm().item()
        assert (gradient.double() * along).sum().item() == pytest.approx(dot, rel=relative, abs=slack)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("backend")
def test_golden_row(name: str, dtype: torch.dtype) -> None:
    text = ROWS[name]["inputs"]
    student, teacher = inputs(text, dtype)
    loss_fn = loss_of(name, text)
    if not refused(loss_fn, student.requires_grad_(), teacher):
        check_row(name, loss_fn, [student, teacher])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MLKD_NAMES)
@pytest.mark.usefixtures("backend")
def test_golden_mlkd_row(name: str, dtype: torch.dtype) -> None:
    text = ROWS[name]["inputs"]
    student, teacher = inputs(text, dtype)
    projected = re.search(r"already projected: wave\(\(([\d,]+)\),([\d.]+),([\d.]+)\)", text)
    if projected:
        shape = [int(k) for k in projected[1].split(",")]
        student = wave(shape, float(projected[2]), float(projected[3]), dtype)
    slope, offset, modulus = map(int, re.search(r"label of image i=\((\d+)i\+(\d+)\)%(\d+)", text).groups())
    images = torch.arange(len(student) // 4, device=DEVICE)
    labels = ((slope * images + offset) % modulus).repeat_interleave(4)
    terms: dict[str, Callable[..., Tensor]] = {
        "mlkd_corr": kdkernels.correlation_loss,
        "mlkd_align": kdkernels.alignment_loss,  # no op in it, so no backend refuses it
        "mlkd_sup": lambda s, t: kdkernels.supervised_contrastive_loss(s, t, labels),
    }
    kind = name.split("[")[0]
    student.requires_grad_()
    teacher.requires_grad_(kind == "mlkd_sup")
    if kind == "mlkd_align" or not refused(terms[kind], student, teacher):
        check_row(name, terms[kind], [student, teacher])


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
