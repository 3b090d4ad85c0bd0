"""Rows of tokens: from files, as padded batches, and the hashes that a teacher's cache is checked by."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # the label of a token that does not count, in transformers as in PyTorch
Row = Mapping[str, Any]


def token_rows(path: str | Path, tokenizer: Any = None, max_length: int | None = None) -> list[dict[str, list[int]]]:
    """The rows of a text file, ready for a teacher's cache and for training.

    Args:
        path: a .txt file with a text in each line, or a .jsonl file with an object in each line: {"text": ...}, or
            {"input_ids": [...]} and perhaps {"labels": [...]}, in which -100 marks tokens that do not count (prompts).
        tokenizer: a transformers tokenizer; only texts need it.
        max_length: longer rows are cut to this many tokens.

    Raises:
        ValueError: another kind of file; a line that is neither, or holds no token; a text without a tokenizer.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"data must be a .txt or .jsonl file, got {str(path)!r}")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = _tokens(
                {"text": line.rstrip("\n")} if path.suffix == ".txt" else _object(line, where), tokenizer, where
            )
            rows.append({name: ids[:max_length] for name, ids in row.items()})
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict) or not {"text", "input_ids"} & row.keys():
        raise ValueError(f"{where} must be an object with 'text' or 'input_ids'")
    return row


def _tokens(row: dict[str, Any], tokenizer: Any, where: str) -> dict[str, list[int]]:
    if "input_ids" not in row:
        if tokenizer is None:
            raise ValueError(f"{where} is text: give the tokenizer")
        row = {"input_ids": tokenizer(row["text"])["input_ids"]}
    found: dict[str, list[int]] = {name: row[name] for name in ("input_ids", "labels") if name in row}
    if not found["input_ids"] or len({len(ids) for ids in found.values()}) > 1:
        raise ValueError(f"{where} must have one or more tokens, and a label for each if it has labels")
    return found


class SequenceCollator:
    """Rows of tokens as one batch, padded on the right: ``data_collator=SequenceCollator(pad_token_id)``.

    Rows are mappings with ``input_ids`` (L,) and, if wanted, ``labels`` (L,), else the tokens themselves; of a
    ``TeacherCache`` also ``teacher_ids`` and ``teacher_logprobs`` (L, k). Other columns are left out. The batch has
    also ``attention_mask``; padding has the label -100.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int) or pad_token_id < 0:
            raise ValueError(f"SequenceCollator: pad_token_id must be a token's index, got {pad_token_id!r}")
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        labels = [torch.as_tensor(row.get("labels", row["input_ids"]), dtype=torch.int64) for row in rows]
        batch = {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([torch.ones_like(x) for x in ids], 0),
            "labels": _padded(labels, IGNORED),
        }
        if "teacher_ids" in rows[0]:
            batch["teacher_ids"] = _padded([row["teacher_ids"].long() for row in rows], 0)
            batch["teacher_logprobs"] = _padded([row["teacher_logprobs"] for row in rows], -math.inf)
        return batch


def _padded(rows: list[Tensor], value: float) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)


def batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    for start in range(0, len(rows), size):
        yield [rows[i] for i in range(start, min(start + size, len(rows)))]


def row_hash(row: Row) -> int:
    """64 bits of a row's tokens."""
    tokens = np.asarray(row["input_ids"], dtype=np.int64)
    return int.from_bytes(blake2b(tokens.tobytes(), digest_size=8).digest(), "little", signed=True)


def vocabulary_hash(tokenizer: Any) -> str:
    """Of all tokens with their indices: equal for two tokenizers that give a text the same meaning."""
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"the tokenizer must be one of transformers, with get_vocab(), got {type(tokenizer).__name__}")
    return sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
