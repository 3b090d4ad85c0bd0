"""The presets for language models: the numbers that TRL's, Liger's and torchtune's own code gave, and their quirks."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import DEVICE, gradients, refused, wave
from torch import Tensor

from kdkernels.compat.liger import LigerFusedLinearJSDLoss
from kdkernels.compat.torchtune import ForwardKLLoss
from kdkernels.compat.trl import generalized_jsd_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "language.json").read_text())
ROWS = {row["name"]: row for row in GOLDEN["rows"]}
LABELS = torch.tensor(GOLDEN["labels"], device=DEVICE)
PRESETS = ("trl_jsd", "liger_jsd", "torchtune_ForwardKLLoss")
NAMES = [name for name in ROWS if name.startswith(PRESETS)]


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    found = {}
    for name, text in GOLDEN["inputs"].items():
        shape, seed, scale = re.fullmatch(r"wave\(\(([\d,]+)\),([\d.]+),([\d.]+)\)", text).groups()
        found[name] = wave([int(n) for n in shape.split(",") if n], float(seed), float(scale), dtype)
    return found


def settings(name: str) -> dict[str, Any]:
    """The numbers in a row's name."""
    return {key: float(value) for key, value in re.findall(r"(\w+)=([\d.]+)", name)}


def trl(name: str, x: dict[str, Tensor]) -> Tensor:
    number = settings(name)
    s, t = (x[f"{who}_logits"].view(2, 3, -1) for who in ("student", "teacher"))
    labels = None if "no labels" in name else LABELS.view(2, 3)
    reduction = re.search("batchmean|mean|sum", name)[0]
    items = number.get("num_items_in_batch")
    items = items if items is None else torch.tensor(int(items), device=DEVICE)
    return generalized_jsd_loss(s, t, labels, number["beta"], number["T"], reduction, items)


def liger(name: str, x: dict[str, Tensor]) -> Tensor:
    number, options = settings(name), {"beta": 0.5, "temperature": 2.0}
    if "padding" in name:
        options["pad_smaller_vocabulary"] = True
    else:
        weights = {"weight_hard_loss": number["hard"], "weight_soft_loss": number["soft"]}
        options = {"beta": number["beta"], "temperature": number["T"], **weights}
    loss = LigerFusedLinearJSDLoss(chunk_size=2, **options)
    heads = [x[f"{who}_{what}"] for who in ("student", "teacher") for what in ("hidden", "weight")]
    biases = [x["student_bias"], x["teacher_bias"]] if ROWS[name]["bias"] else []
    return loss(*heads, LABELS, *biases)


def torchtune(name: str, x: dict[str, Tensor]) -> Tensor:
    return ForwardKLLoss()(x["student_logits"], x["teacher_logits"], LABELS, "True" in name)


PRESET: dict[str, Callable[[str, dict[str, Tensor]], Tensor]] = dict(zip(PRESETS, (trl, liger, torchtune), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("backend")
def test_the_numbers_are_the_originals(name: str, dtype: torch.dtype) -> None:
    row, x = ROWS[name], inputs(dtype)
    x["student_weight"] = x["student_weight"][: row.get("student_vocab")]
    for who in ("student", "teacher"):
        x[f"{who}_logits"] = x[f"{who}_hidden"] @ x[f"{who}_weight"].T
    leaves = [leaf for leaf in row["gradient"] if leaf == "student_logits"] or list(row["gradient"])
    for leaf in leaves:
        x[leaf].requires_grad_()
    loss_fn = PRESET[name.split()[0]]
    if refused(lambda *_: loss_fn(name, x), x[leaves[0]]):
        return
    loss = loss_fn(name, x)
    relative = 1e-9 if dtype == torch.float64 else 1e-5
    assert loss.dtype == dtype
    assert loss.shape == ()
    assert loss.item() == pytest.approx(row["loss"], rel=relative)
    for leaf, found in zip(leaves, gradients(loss, [x[leaf] for leaf in leaves]), strict=True):
        expected, along = row["gradient"][leaf], wave(found.shape, 0.5, 1)
        assert found.double().norm().item() == pytest.approx(expected["norm"], rel=relative), leaf
        slack = relative * expected["norm"] * along.norm().item()
        assert (found.double() * along).sum().item() == pytest.approx(expected["dot_wave"], abs=slack), leaf


SIGNATURES = {
    generalized_jsd_loss: "(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, "
    "reduction='batchmean', num_items_in_batch=None)",
    LigerFusedLinearJSDLoss: "(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, ignore_index=-100, "
    "temperature=1.0, compiled=True, chunk_size=1024, return_soft_hard_loss=False, *, pad_smaller_vocabulary=False)",
    LigerFusedLinearJSDLoss.forward: "(self, student_input, student_weight, teacher_input, teacher_weight, "
    "true_labels, student_bias=None, teacher_bias=None)",
    ForwardKLLoss: "(ignore_index=-100)",
    ForwardKLLoss.forward: "(self, student_logits, teacher_logits, labels, normalize=True)",
}


@pytest.mark.parametrize("preset", SIGNATURES, ids=lambda preset: preset.__qualname__)
def test_signatures_are_the_originals(preset: Callable[..., Any]) -> None:
    signature = inspect.signature(preset)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == SIGNATURES[preset]


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_trls_elements(beta: float) -> None:
    """reduction="none": before any sum."""
    s, t = torch.randn(2, 3, 5, device=DEVICE, requires_grad=True), torch.randn(2, 3, 5, device=DEVICE)
    labels = torch.tensor([[1, -100, 2], [0, 4, -100]], device=DEVICE)
    elements = generalized_jsd_loss(s, t, labels, beta, 2.0, "none")
    assert elements.shape == (4, 5)
    total = generalized_jsd_loss(s, t, labels, beta, 2.0, "sum")
    torch.testing.assert_close(elements.sum(), total)
    torch.testing.assert_close(gradients(elements.sum(), [s]), gradients(total, [s]))


def test_what_does_not_count_may_be_anything() -> None:
    s, t = (torch.randn(3, 5, device=DEVICE) for _ in range(2))
    labels = torch.tensor([1, -100, 4], device=DEVICE)
    expected = [loss(s[::2], t[::2], labels[::2]) for loss in (generalized_jsd_loss, ForwardKLLoss())]
    s[1], t[1] = torch.nan, -torch.inf
    s.requires_grad_()
    for loss, value in zip((generalized_jsd_loss, ForwardKLLoss()), expected, strict=True):
        found = loss(s, t, labels)
        torch.testing.assert_close(found, value)
        assert gradients(found, [s])[0].isfinite().all()
        assert loss(s, t, torch.full_like(labels, -100)) == 0


def test_ligers_parts() -> None:
    heads = [torch.randn(*shape, device=DEVICE) for shape in ((6, 4), (9, 4), (6, 5), (11, 5))]
    labels = LABELS % 9
    labels[1] = -100
    for rows in (9, 11):
        x = [*heads[:3], heads[3][:rows]]
        options = {"weight_hard_loss": 0.3, "weight_soft_loss": 0.7, "beta": 0.2, "pad_smaller_vocabulary": True}
        loss, soft, hard = LigerFusedLinearJSDLoss(return_soft_hard_loss=True, **options)(*x, labels)
        torch.testing.assert_close(0.3 * hard + 0.7 * soft, loss)
        logits = heads[0] @ heads[1].T
        torch.testing.assert_close(hard, torch.nn.functional.cross_entropy(logits, labels), rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "beta": (
        r"beta must be in \[0, 1\], got 2",
        lambda: generalized_jsd_loss(wave((2, 3), 1, 1), wave((2, 3), 2, 1), beta=2),
    ),
    "reduction": (
        "reduction must be one of 'batchmean', 'sum', 'mean', 'none', got 'max'",
        lambda: generalized_jsd_loss(wave((2, 3), 1, 1), wave((2, 3), 2, 1), reduction="max"),
    ),
    "vocabularies": (
        "has 9 tokens and the teacher's 11: pad_smaller_vocabulary=True",
        lambda: LigerFusedLinearJSDLoss()(*(wave(x, 1, 1) for x in ((6, 4), (9, 4), (6, 5), (11, 5))), LABELS),
    ),
    "labels": (
        r"labels must have shape \(2,\), got \(6,\)",
        lambda: ForwardKLLoss()(wave((2, 3), 1, 1), wave((2, 3), 2, 1), LABELS),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_use_is_named(name: str) -> None:
    message, call = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_teacher_that_is_trained_is_warned_of() -> None:
    t = torch.randn(2, 3, device=DEVICE, requires_grad=True)
    with pytest.warns(UserWarning, match="teacher's tensor requires a gradient"):
        generalized_jsd_loss(torch.randn(2, 3, device=DEVICE), t)
