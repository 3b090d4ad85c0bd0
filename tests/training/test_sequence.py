"""SequenceDistillation: the loss of whole logits, without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import DEVICE, check_close
from sequence_tools import ROWS, VOCABULARY, counted, dense_loss, gpt2, llama, on_device, teacher
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from kdkernels.training import SequenceCollator, SequenceDistillation
from kdkernels.training.sequence_data import vocabulary_hash

BATCH = on_device(SequenceCollator()(ROWS[:8]))


def weight_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "ce_weight": 0.3}], ids=["KL", "KL and CE at T = 2"])
def test_the_loss_is_that_of_whole_logits(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    student = make()
    expected = dense_loss(student, BATCH, **options) / counted(BATCH)
    loss = SequenceDistillation(student, teacher(), **options)(BATCH)
    check_close("loss", loss, expected, 1e-5)
    for a, e in zip(weight_gradients(student, loss), weight_gradients(student, expected), strict=True):
        check_close("gradient", a, e, 1e-4)


def test_micro_batches_with_a_denominator_are_one_batch() -> None:
    student = llama()
    distil = SequenceDistillation(student, teacher())
    whole = weight_gradients(student, distil(BATCH))
    parts = [{name: x[i : i + 2] for name, x in BATCH.items()} for i in range(0, 8, 2)]
    sums = sum(distil(part, counted(BATCH)) for part in parts)
    for a, e in zip(weight_gradients(student, sums), whole, strict=True):
        check_close("gradient", a, e, 1e-5)
    moved = {**BATCH, "shift_labels": nn.functional.pad(BATCH["labels"][:, 1:], (0, 1), value=-100)}
    assert torch.equal(distil({**moved, "labels": torch.zeros_like(BATCH["labels"])}), distil(BATCH))
    nothing = distil({**BATCH, "labels": torch.full_like(BATCH["labels"], -100)})
    assert nothing == 0
    assert all(not g.any() for g in weight_gradients(student, nothing))


WIDE = 500  # tokens of a vocabulary that outweighs everything else in these models


class NoLogits(TorchDispatchMode):
    """Fails on a tensor of half the size tokens x vocabulary, or more."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            assert not isinstance(x, Tensor) or x.numel() < BATCH["labels"].numel() * WIDE // 2, "logits"
        return out


def test_no_logits_are_made() -> None:
    student = llama(vocabulary=WIDE)
    distil = SequenceDistillation(student, llama(vocabulary=WIDE, seed=1), chunk=16)
    with NoLogits():
        distil(BATCH).backward()
    with NoLogits(), pytest.raises(AssertionError, match="logits"):
        student(BATCH["input_ids"])
    assert student(BATCH["input_ids"]).logits.shape[1] == BATCH["labels"].shape[1], "the hook is still there"


@pytest.mark.parametrize("kind", ["soft cap", "scale"])
def test_what_a_model_does_after_its_head(kind: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1}
    student: nn.Module = (
        Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=0.5))
        if kind == "soft cap"
        else CohereForCausalLM(CohereConfig(**sizes, logit_scale=3.0))
    ).to(DEVICE)
    expected = dense_loss(student.eval(), BATCH) / counted(BATCH)
    check_close("loss", SequenceDistillation(student, teacher())(BATCH), expected, 1e-5)


class Odd(nn.Module):
    """A model whose logits are not its head's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def forward(self, **inputs: Tensor) -> Any:
        output = self.model(**inputs)
        output.logits = output.logits.square()
        return output


def lora() -> nn.Module:
    model = llama()
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))
    return model


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "no language model": (TypeError, "get_output_embeddings", lambda: SequenceDistillation(nn.Linear(2, 2), llama())),
    "no head": (
        TypeError,
        r"student must be a causal .*AutoModelForCausalLM\), got LlamaModel",
        lambda: SequenceDistillation(llama().model, teacher()),
    ),
    "no tokenizer": (TypeError, "tokenizer must be one of transformers", lambda: vocabulary_hash("gpt2")),
    "no teacher": (TypeError, "or a TeacherCache, got str", lambda: SequenceDistillation(llama(), "teacher")),
    "same module": (ValueError, "same module", lambda: SequenceDistillation(teacher(), teacher())),
    "wrapped head": (
        ValueError,
        "student's head must be a plain nn.Linear",
        lambda: SequenceDistillation(lora(), llama()),
    ),
    "other logits": (
        ValueError,
        r"teacher \(Odd\) does more to its logits",
        lambda: SequenceDistillation(llama(), Odd()),
    ),
    "own option": (
        ValueError,
        "sets reduction itself",
        lambda: SequenceDistillation(llama(), teacher(), reduction="sum"),
    ),
    "rest": (ValueError, "rest must be one of", lambda: SequenceDistillation(llama(), teacher(), rest="zero")),
    "no labels": (
        TypeError,
        "no labels, only input_ids",
        lambda: SequenceDistillation(llama(), teacher())({"input_ids": BATCH["input_ids"]}),
    ),
    "pad token": (ValueError, "pad_token_id must be a token's index, got None", lambda: SequenceCollator(None)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_use_is_named(name: str) -> None:
    error, message, call = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
