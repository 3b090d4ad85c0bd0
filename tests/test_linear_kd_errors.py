"""What linear_kd_loss refuses, and that it says what to pass instead; entries that are invalid or not there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from checking import DEVICE, check_close
from test_linear_kd import LABELS, TOKENS, heads
from torch import Tensor, nn

from kdkernels import Head, LinearKDLoss, TopK, linear_kd_loss


def networks() -> tuple[Head, Head]:
    tensors = heads(torch.float32)
    return Head(*tensors[:3]), Head(*tensors[3:])


def top_k(rest: str = "bucket", k: int = 3) -> TopK:
    teacher = networks()[1]
    logprobs, ids = (teacher.hidden @ teacher.weight.T).log_softmax(-1).topk(k)
    return TopK(ids, logprobs, rest)


class Elsewhere(Tensor):
    """A tensor subclass whose values lie in other tensors, as quantised ones."""

    def __tensor_flatten__(self) -> None: ...


def with_attribute(x: Tensor, name: str) -> Tensor:
    x = x.clone()
    setattr(x, name, object())
    return x


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.lora_A = nn.Linear(4, 4), nn.ModuleDict({"default": nn.Linear(4, 2)})


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (nn.Linear(4, 11), TypeError, "must be a tensor, got the module Linear: pass module.weight"),
        (LoRA(), TypeError, "must be a tensor, got a LoRA with LoRA factors, .*the merged weight"),
        (
            with_attribute(torch.ones(11, 4), "full_tensor"),
            TypeError,
            r"is a DTensor, .*full_tensor\(\), .*group=",
        ),
        (with_attribute(torch.ones(0), "ds_shape"), ValueError, "is partitioned by ZeRO-3 .*GatheredParameters"),
        (torch.ones(22, 1, dtype=torch.uint8), TypeError, "must be .*, got torch.uint8 in a Tensor; .*dequantised"),
        (with_attribute(torch.ones(22, 1), "quant_state"), TypeError, "must be a plain .*dequantised"),
        (torch.ones(11, 4).as_subclass(Elsewhere), TypeError, "must be a plain .* in a Elsewhere.*dequantised"),
        ([[1.0]], TypeError, "must be a torch.Tensor, got list"),
    ],
)
def test_weights_that_are_no_plain_tensor(weight: Any, error: type[Exception], message: str) -> None:
    student, teacher = networks()
    with pytest.raises(error, match=f"student's weight {message}"):
        linear_kd_loss(Head(student.hidden, weight), teacher)
    with pytest.raises(error, match=f"teacher's weight {message}"):
        linear_kd_loss(student, Head(student.hidden, weight))


def test_hidden_and_weight_belong_together() -> None:
    student, teacher = networks()
    with pytest.raises(ValueError, match=r"student's hidden and weight must be .* got \(6, 4\) and \(11, 5\)"):
        linear_kd_loss(Head(student.hidden, teacher.weight), teacher)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"student": torch.ones(6, 11)}, TypeError, r"student must be a Head\(hidden, weight\), got Tensor"),
        ({"teacher": nn.Linear(4, 4)}, TypeError, "teacher .a Head, a TopK or logits. must be a tensor"),
        ({"teacher": torch.ones(5, 11)}, ValueError, r"same positions, got \(6,\) and \(5,\)"),
        ({"teacher": torch.ones(6, 13)}, ValueError, "vocabularies of 11 and 13.*vocab_size="),
        ({"vocab_size": 12}, ValueError, "vocab_size must be at most 11, got 12"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be 1 or more"),
        ({"chunk": 2.0}, TypeError, "chunk must be an int or None, got float"),
        ({"ce_weight": 0.5}, ValueError, "need a target"),
        ({"target": LABELS.float()}, TypeError, "target must be int64"),
        ({"target": LABELS[:3]}, ValueError, r"target must have shape \(6,\), got \(3,\)"),
        ({"mask": LABELS}, TypeError, "mask must be a bool tensor"),
        ({"mask": LABELS[:2] > 0}, ValueError, r"mask must have the positions' shape \(6,\)"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be 'mean', 'sum' or 'none'"),
        ({"denominator": 3, "reduction": "sum"}, ValueError, "denominator is what reduction='mean' divides by"),
        ({"denominator": 0}, ValueError, "denominator must be positive"),
        ({"denominator": torch.ones(2)}, ValueError, r"denominator must be one real .* of shape \(2,\)"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of 'forward', 'reverse'"),
        ({"divergence": "jsd", "beta": 1.0}, ValueError, "is 'reverse'"),
        ({"decouple": (1, 8), "teacher": top_k(), "target": LABELS}, ValueError, "every class .* which a TopK has not"),
        ({"standardize": True, "teacher": top_k()}, ValueError, "every class of a row, which a TopK has not"),
        ({"teacher": top_k("zero")}, ValueError, "rest must be one of 'bucket', 'drop'"),
        ({"teacher": top_k(), "temperature": 2.0}, ValueError, "at temperature 1.0 and the loss at 2.0"),
        ({"teacher": top_k("renormalise"), "divergence": "reverse"}, ValueError, "is infinite where"),
        ({"teacher": top_k()._replace(ids=torch.ones(6, 3))}, TypeError, "must be an int64 tensor, got torch.float32"),
        ({"teacher": top_k()._replace(logprobs=torch.ones(6, 2))}, ValueError, r"\(6, 3\) and \(6, 2\)"),
        ({"group": 3}, TypeError, "ProcessGroup or None, got int"),
    ],
)
def test_invalid_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    student, teacher = networks()
    arguments: dict[str, Any] = {"student": student, "teacher": teacher, **options}
    target = arguments.pop("target", None)
    with pytest.raises(error, match=message):
        linear_kd_loss(arguments.pop("student"), arguments.pop("teacher"), target, **arguments)


def test_scale_softcap_and_devices() -> None:
    student, teacher = networks()
    for bad, message in (
        (student._replace(scale=0.0), "student's scale must be finite and not 0"),
        (student._replace(softcap=-1.0), "student: softcap must be positive"),
        (student._replace(bias=student.weight[:3, 0]), r"bias must be \(V,\) with weight \(11, 4\), got \(3,\)"),
        (student._replace(weight=student.weight.to("meta")), "weight on meta; move one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_kd_loss(bad, teacher)
    with pytest.raises(ValueError, match="teacher on meta; move one of them"):
        linear_kd_loss(student, Head(*(x.to("meta") for x in teacher[:3])))
    with pytest.raises(ValueError, match="temperature must be positive"):
        LinearKDLoss(temperature=0.0)


@pytest.mark.skipif(DEVICE != "cpu", reason="values are read on the CPU alone")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_invalid_values_raise_on_the_cpu(reduction: str) -> None:
    student, teacher = networks()
    for label in (11, -7):
        target = LABELS.clone()
        target[3] = label
        with pytest.raises(ValueError, match=f"target has label {label}; valid are 0..10, and -100 to ignore"):
            linear_kd_loss(student, teacher, target, reduction=reduction)
    with pytest.raises(ValueError, match=r"label -100; valid are 0\.\.10, and -1 to ignore"):
        linear_kd_loss(student, teacher, LABELS, ignore_index=-1, reduction=reduction)
    ids, logprobs, *_ = top_k()
    for position, broken in (
        (2, ids.index_fill(0, torch.tensor(2), 4)),  # three times the same id
        (0, ids.index_fill(1, torch.tensor(1), 11)),
        (0, ids - 100),
    ):
        with pytest.raises(ValueError, match=rf"TopK of position {position} is invalid: its ids must differ"):
            linear_kd_loss(student, TopK(broken, logprobs), reduction=reduction)
    with pytest.raises(ValueError, match="sum to at most 1"):
        linear_kd_loss(student, TopK(ids, logprobs + 1), reduction=reduction)
    # renormalised they may be anything, logits for instance
    teachers = TopK(ids, logprobs + 1, "renormalise"), TopK(ids, logprobs, "renormalise")
    check_close("shifted", *(linear_kd_loss(student, t, reduction=reduction) for t in teachers), 1e-5)


def test_invalid_values_are_nan_where_nothing_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdkernels.ops.linear_kd.chunks._check_values", lambda *_: None)
    student, teacher = networks()
    hidden = student.hidden.requires_grad_()
    target = LABELS.clone()
    target[3] = 11
    ids, logprobs, *_ = top_k()
    ids = ids.clone()
    ids[3, 0] = ids[3, 1]
    bad = torch.arange(TOKENS, device=DEVICE) == 3
    for network, labels in ((teacher, target), (TopK(ids, logprobs), None), (TopK(ids, logprobs), target)):
        loss = linear_kd_loss(student, network, labels, reduction="none", ce_weight=0.5 if labels is not None else 0.0)
        assert torch.equal(loss.isnan(), bad)
        (gradient,) = torch.autograd.grad(loss.sum(), hidden)
        assert torch.equal(gradient.isnan().any(1), bad)
        assert torch.equal(gradient.isnan().all(1), bad)


@pytest.mark.parametrize("rest", ["bucket", "drop", "renormalise", "renormalise_both"])
def test_padding_of_a_top_k_is_not_there(rest: str) -> None:
    """By logprobs of -inf, whatever the ids are; a position with nothing else has no teacher."""
    student, _ = networks()
    hidden = student.hidden.requires_grad_()
    ids, logprobs, *_ = top_k(k=2)
    pad_ids = torch.tensor([[-1, 99], [0, 0]], device=DEVICE).repeat(TOKENS // 2, 1)
    padded = TopK(torch.cat([pad_ids, ids], 1), torch.cat([torch.full_like(logprobs, -math.inf), logprobs], 1), rest)
    for divergence in ("forward", "jsd", "skew_reverse"):
        options: dict[str, Any] = {"divergence": divergence, "chunk": 4}
        losses = [linear_kd_loss(student, t, **options) for t in (padded, TopK(ids, logprobs, rest))]
        found, expected = (torch.autograd.grad(x, hidden)[0] for x in losses)
        check_close("loss", *losses, 1e-6)
        check_close("gradient", found, expected, 1e-6)
        nothing = TopK(ids, torch.full_like(logprobs, -math.inf), rest)
        loss = linear_kd_loss(student, nothing, **options)
        assert abs(loss) < 1e-6
        assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-6


def test_a_confident_teacher_has_a_finite_reverse_kl() -> None:
    """In fp32 its k probabilities sum to 1, and the bucket's floor stands for what is left."""
    student, _ = networks()
    ids = torch.tensor([[0, 1]], device=DEVICE).expand(TOKENS, 2)
    logprobs = torch.tensor([[0.0, -40.0]], device=DEVICE).expand(TOKENS, 2)
    hidden = student.hidden.requires_grad_()
    for divergence in ("forward", "reverse", "jsd"):
        loss = linear_kd_loss(student, TopK(ids, logprobs), divergence=divergence)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, hidden)[0].isfinite().all()
