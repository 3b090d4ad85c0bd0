"""What the tests of language models share: a text by letters, small models, and a teacher that has learned a little."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checking import DEVICE
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kdkernels.training.sequence_data import SequenceCollator

TEXT = (Path(__file__).parents[1] / "LICENSE").read_text()[:6000]
LETTERS = sorted(set(TEXT))
VOCABULARY = len(LETTERS)
BATCH, STEPS, LR = 16, 12, 0.01


def rows() -> list[dict[str, Any]]:
    """64 rows of 20 to 43 letters; the first five of every third row are a prompt, which does not count."""
    found, start = [], 0
    for i in range(64):
        length = 20 + (7 * i) % 24
        ids = [LETTERS.index(letter) for letter in TEXT[start : start + length]]
        start += length
        found.append({"input_ids": ids, "labels": [-100] * 5 + ids[5:] if i % 3 == 0 else ids})
    return found


ROWS = rows()


def llama(width: int = 16, layers: int = 1, vocabulary: int = VOCABULARY, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).to(DEVICE)


def gpt2(seed: int = 0) -> nn.Module:
    """Its head's weight is that of its embedding."""
    torch.manual_seed(seed)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **tokens, **drop)).to(DEVICE)


@functools.cache
@torch.enable_grad()  # whoever asks first may be in no_grad
def teacher() -> nn.Module:
    """Two layers, 40 steps: it knows which letters are frequent and which follow each other."""
    model = llama(32, 2, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    collate = SequenceCollator()
    for step in range(40):
        batch = on_device(collate(ROWS[16 * (step % 4) : 16 * (step % 4) + 16]))
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(DEVICE) for name, x in batch.items()}


def dense_loss(
    student: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0, ce_weight: float = 0.0
) -> Tensor:
    """By whole logits: the sum over the tokens that count of T^2 KL(teacher || student) + ce_weight CE."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        log_p = F.log_softmax(teacher()(**inputs).logits[:, :-1] / temperature, -1)
    logits, labels = student(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    log_q = F.log_softmax(logits / temperature, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[labels != -100].sum()
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return temperature**2 * kl + ce_weight * ce


def counted(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"][:, 1:] != -100).sum()


def by_whole_logits(student: nn.Module, steps: int = STEPS, **options: float) -> list[float]:
    """The same training in a plain loop, with the logits of both models."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0)
    losses, collate = [], SequenceCollator()
    student.train()
    for step in range(steps):
        start = step * BATCH % len(ROWS)
        batch = on_device(collate(ROWS[start : start + BATCH]))
        loss = dense_loss(student, batch, **options) / counted(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
