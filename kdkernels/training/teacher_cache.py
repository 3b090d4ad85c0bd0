"""A teacher's most likely tokens, written once and read in every epoch. It needs the extra "hf".

DIR/teacher.json              what the shards are of: rows, k, temperature, vocabulary, teacher (see shards.py)
DIR/shard-00000.safetensors   ids, logprobs (tokens, k); starts (rows + 1), hashes (rows)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..heads import Head
from ..ops.checks import check_choice, check_positive, compute_dtype
from ..ops.linear_kd.products import Linear, logits
from .runs import write_whole
from .sequence import LanguageModel
from .sequence_data import Row, SequenceCollator, batches, row_hash, vocabulary_hash
from .shards import begin, check_whole, number_of_shards, read_settings, shard_path

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16}
CHUNK_BYTES = 64 * 2**20  # of logits at a time


def write_teacher_cache(
    teacher: nn.Module,
    rows: Sequence[Row],
    folder: str | Path,
    *,
    top_k: int = 64,
    temperature: float = 1.0,
    tokenizer: Any = None,
    vocab_size: int | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    rows_per_shard: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherCache:
    """Write the k most likely next tokens of every position, with their log-probabilities, shard by shard.

    A run that was interrupted goes on where it was: whole shards are kept, if they are of these rows and options.

    Args:
        teacher: a causal language model with ``get_output_embeddings()``; it runs where it is, in eval mode.
        rows: the training rows, in order: mappings with ``input_ids``.
        folder: made if it is not there.
        top_k: k.
        temperature: of the softmax whose logarithms are written, and later of the loss.
        tokenizer: a transformers tokenizer; the hash of its vocabulary is written, to be compared with the student's.
        vocab_size: tokens that exist, if the teacher's head has more (padded vocabularies).
        dtype: of the log-probabilities: "float32", or "float16", which rounds them by up to 1 part in 2000.
        batch_size: rows that the teacher sees at a time.
        rows_per_shard: rows in a file.
        progress: called with the number of shards done, and of all.

    Raises:
        TypeError, ValueError: a model without a plain head, options out of range, no rows, or a folder with the cache
            of other rows or options.
    """
    model = LanguageModel(teacher.eval(), "teacher")
    width = model.head.out_features
    check_positive("write_teacher_cache", temperature=temperature)
    check_choice("write_teacher_cache: dtype", dtype, tuple(DTYPES))
    _check_whole("vocab_size", width if vocab_size is None else vocab_size, width)
    _check_whole("top_k", top_k, vocab_size or width)
    _check_whole("batch_size", batch_size)
    _check_whole("rows_per_shard", rows_per_shard)
    if not len(rows):
        raise ValueError("write_teacher_cache: there are no rows")
    settings = {
        "format": FORMAT,
        "rows": len(rows),
        "rows_per_shard": rows_per_shard,
        "top_k": top_k,
        "temperature": float(temperature),
        "vocab_size": vocab_size or width,
        "vocabulary": None if tokenizer is None else vocabulary_hash(tokenizer),
        "teacher": str(getattr(getattr(teacher, "config", None), "name_or_path", "")),
        "dtype": dtype,
    }
    folder = Path(folder)
    begin(folder, settings)
    shards = number_of_shards(settings)
    for number, shard in enumerate(batches(rows, rows_per_shard)):
        path = shard_path(folder, number)
        if path.is_file():
            _check_hashes(path, shard, number * rows_per_shard)
        else:
            write_whole(path, partial(save_file, _top_k(model, shard, settings, batch_size)))
        if progress is not None:
            progress(number + 1, shards)
    return TeacherCache(folder)


def _check_whole(name: str, value: int, most: int = 2**31) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"write_teacher_cache: {name} must be a whole number from 1 to {most}, got {value!r}")


def _check_hashes(path: Path, rows: Sequence[Row], first: int) -> None:
    with safe_open(path, "pt") as file:
        hashes = file.get_tensor("hashes").tolist()
    for number, (row, expected) in enumerate(zip(rows, hashes, strict=True), first):
        _check_row(row, expected, number)


def _check_row(row: Row, expected: int, number: int) -> None:
    if row_hash(row) != expected:
        raise ValueError(f"row {number} has other tokens than the cache's: it is of another data set, or another order")


@torch.inference_mode()
def _top_k(model: LanguageModel, rows: Sequence[Row], settings: dict[str, Any], batch_size: int) -> dict[str, Tensor]:
    """One shard."""
    collate, device = SequenceCollator(), model.head.weight.device
    ids, logprobs, lengths = [], [], []
    for part in batches(rows, batch_size):
        batch = collate([{"input_ids": row["input_ids"]} for row in part])
        mask = batch["attention_mask"]
        lengths += mask.sum(1).tolist()
        head = model({name: batch[name].to(device) for name in ("input_ids", "attention_mask")})
        head = head._replace(hidden=head.hidden[mask.flatten().bool().to(device)])
        for top, found in _of_chunks(head, settings):
            ids.append(found.to("cpu", torch.int32))
            logprobs.append(top.to("cpu", DTYPES[settings["dtype"]]))
    return {
        "ids": torch.cat(ids),
        "logprobs": torch.cat(logprobs),
        "starts": torch.tensor([0, *lengths]).cumsum(0),
        "hashes": torch.tensor([row_hash(row) for row in rows]),
    }


def _of_chunks(head: Head, settings: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    hidden, columns = head.hidden, settings["vocab_size"]
    linear = Linear(head.weight, head.bias, head.scale, head.softcap or 0.0).narrow(columns)
    for part in hidden.split(max(1, CHUNK_BYTES // (4 * columns))):
        z = part.new_empty(len(part), columns, dtype=compute_dtype(hidden, head.weight))
        logits(linear, part, [z])
        z.div_(settings["temperature"])
        top, found = z.topk(settings["top_k"], dim=1)
        yield top - z.logsumexp(1, keepdim=True), found


class TeacherCache:
    """What ``write_teacher_cache`` wrote: ``cache.join(dataset)`` are the rows with their teacher.

    Attributes: ``top_k``, ``temperature``, ``vocab_size``, ``vocabulary`` (the hash, or None), ``len()`` (rows).

    Raises:
        ValueError: a folder without a cache, or with one that is not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder, FORMAT)
        self.top_k, self.temperature = self.settings["top_k"], self.settings["temperature"]
        self.vocab_size, self.vocabulary = self.settings["vocab_size"], self.settings["vocabulary"]
        check_whole(self.folder, self.settings)

    def __len__(self) -> int:
        return self.settings["rows"]

    def row(self, number: int, tokens: Row) -> tuple[Tensor, Tensor]:
        """ids int32 and log-probabilities (L, k) of a row, whose tokens must be those that the teacher saw."""
        shard, place = divmod(number, self.settings["rows_per_shard"])
        with safe_open(shard_path(self.folder, shard), "pt") as file:
            _check_row(tokens, int(file.get_slice("hashes")[place : place + 1]), number)
            first, last = file.get_slice("starts")[place : place + 2].tolist()
            return file.get_slice("ids")[first:last], file.get_slice("logprobs")[first:last]

    def join(self, dataset: Sequence[Row], tokenizer: Any = None) -> Dataset[dict[str, Any]]:
        """The data set with the columns ``teacher_ids`` and ``teacher_logprobs`` (L, k).

        Args:
            dataset: the rows that the cache was made of, in the same order. Each row is checked when it is read.
            tokenizer: the student's; its vocabulary must be the teacher's.

        Raises:
            ValueError: another number of rows, another vocabulary, or a row with other tokens.
        """
        if len(dataset) != len(self):
            raise ValueError(f"the cache is of {len(self)} rows, and the data set has {len(dataset)}")
        if tokenizer is not None:
            if self.vocabulary is None:
                raise ValueError("the cache was made without a tokenizer: its vocabulary is not known")
            if vocabulary_hash(tokenizer) != self.vocabulary:
                raise ValueError("the tokenizer has another vocabulary than the one that the cache was made with")
        joined = _Joined(self, dataset)
        for number in (0, -1):
            joined[number]  # another data set is refused before the training, not in the middle of it
        return joined


class _Joined(Dataset[dict[str, Any]]):
    def __init__(self, cache: TeacherCache, dataset: Sequence[Row]) -> None:
        self.cache, self.dataset = cache, dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        number = range(len(self))[
            number
        ]  # negative ones count from the end, and the last one is followed by an IndexError
        row = self.dataset[number]
        ids, logprobs = self.cache.row(number, row)
        return {**row, "teacher_ids": ids, "teacher_logprobs": logprobs}
