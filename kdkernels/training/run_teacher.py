"""``kdkernels teacher``: a language model's most likely tokens for every row of a file."""

from __future__ import annotations

import argparse

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .sequence_data import token_rows
from .teacher_cache import write_teacher_cache


def write(args: argparse.Namespace) -> None:
    """Write the cache of ``args.data`` by ``args.model``; print how far it is, and where."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = token_rows(args.data, tokenizer, args.max_length)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    teacher: nn.Module = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    cache = write_teacher_cache(
        teacher.to(device),
        rows,
        args.output,
        top_k=args.top_k,
        temperature=args.temperature,
        tokenizer=tokenizer,
        vocab_size=args.vocab_size,
        dtype=args.dtype,
        batch_size=args.batch_size,
        rows_per_shard=args.rows_per_shard,
        progress=lambda done, shards: print(f"\r{done} of {shards} shards", end="", flush=True),
    )
    print(f"\r{len(cache)} rows, {cache.top_k} tokens of {cache.vocab_size} at each position, in {args.output}")
