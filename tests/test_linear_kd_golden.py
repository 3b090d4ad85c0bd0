"""linear_kd_loss against figures that TRL, Liger, DistillKit, Model-Optimizer and others gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import wave
from test_linear_kd import LABELS, heads
from torch import Tensor

from kdkernels import Head, TopK, linear_kd_loss

GOLDEN = json.loads((Path(__file__).parent / "golden/language.json").read_text())
ROWS = [row for row in GOLDEN["rows"] if row["as"] is not None]


def teacher_of(row: dict[str, Any], teacher: Head) -> Head | TopK:
    said = row["as"]
    if "k" not in said:
        return teacher
    made_at = said.get("made_at", said["temperature"])
    logits = teacher.hidden @ teacher.weight.T
    logits = logits if teacher.bias is None else logits + teacher.bias
    logprobs, ids = (logits / made_at).log_softmax(-1).topk(said["k"])
    return TopK(ids, logprobs, said["rest"], made_at)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_meets_the_figures_of_other_libraries(row: dict[str, Any]) -> None:
    said = row["as"]
    hidden, weight, bias, t_hidden, t_weight, t_bias = heads()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    names = ("divergence", "beta", "temperature", "kd_weight", "ce_weight")
    loss = linear_kd_loss(
        Head(hidden, weight, bias if row["bias"] else None),
        teacher_of(row, Head(t_hidden, t_weight, t_bias if row["bias"] else None)),
        LABELS if said["masked"] else None,
        reduction="sum",
        scale_by_t2=False,
        **{name: said[name] for name in names if name in said},
        chunk=4,
    )
    check_figure(loss + said.get("constant", 0), row["loss"])
    names = ("student_hidden", "student_weight", "student_bias")[: 3 if row["bias"] else 2]
    for name, found in zip(names, torch.autograd.grad(loss, leaves[: len(names)]), strict=True):
        check_figure(found.norm(), row["gradient"][name]["norm"])
        check_figure((found * wave(found.shape, 0.5, 1)).sum(), row["gradient"][name]["dot_wave"])


def check_figure(actual: Tensor, expected: float) -> None:
    torch.testing.assert_close(actual.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_every_library_has_rows() -> None:
    assert {"trl", "liger", "distillkit", "model-optimizer", "verl"} <= {row["peer"] for row in ROWS}
