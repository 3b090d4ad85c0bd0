"""A teacher's cache: what is in it, an interruption, what is refused, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checking import DEVICE, check_close
from sequence_tools import LETTERS, ROWS, TEXT, VOCABULARY, counted, dense_loss, llama, on_device, teacher
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from kdkernels import cli
from kdkernels.training import (
    SequenceCollator,
    SequenceDistillation,
    TeacherCache,
    teacher_cache,
    token_rows,
    write_teacher_cache,
)

pytestmark = pytest.mark.xdist_group("teacher cache")

FEW = ROWS[:12]
SETTINGS: dict[str, Any] = {"top_k": 5, "rows_per_shard": 5, "batch_size": 3}


def tokenizer(letters: list[str] = LETTERS) -> PreTrainedTokenizerFast:
    """A token for each letter."""
    words = Tokenizer(WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))
    words.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.mark.parametrize(("temperature", "dtype"), [(1.0, "float32"), (2.0, "float16")])
def test_the_most_likely_tokens_are_written(tmp_path: Path, temperature: float, dtype: str) -> None:
    cache = write_teacher_cache(teacher(), FEW, tmp_path, temperature=temperature, dtype=dtype, **SETTINGS)
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        *(f"shard-0000{i}.safetensors" for i in range(3)),
        "teacher.json",
    ]
    assert (cache.top_k, cache.temperature, cache.vocab_size, len(cache)) == (5, temperature, VOCABULARY, 12)
    joined = cache.join(FEW)
    for i in (0, 4, 5, -1):
        with torch.no_grad():
            logits = teacher()(torch.tensor([FEW[i]["input_ids"]], device=DEVICE)).logits[0].cpu()
        logprobs, ids = (logits / temperature).log_softmax(-1).topk(5)
        assert torch.equal(joined[i]["teacher_ids"].long(), ids)
        check_close("logprobs", joined[i]["teacher_logprobs"], logprobs, 1e-5 if dtype == "float32" else 1e-3)
        assert joined[i]["labels"] == FEW[i]["labels"]
    assert len(list(joined)) == 12  # it ends


def test_a_cache_of_all_tokens_is_the_teacher(tmp_path: Path) -> None:
    cache = write_teacher_cache(teacher(), FEW, tmp_path, top_k=VOCABULARY)
    batch = on_device(SequenceCollator()([cache.join(FEW)[i] for i in range(12)]))
    student = llama()
    expected = dense_loss(student, batch) / counted(batch)
    for rest in ("bucket", "drop", "renormalise"):
        loss = SequenceDistillation(student, cache, rest=rest)(batch)
        check_close(rest, loss, expected, 1e-5)
        gradients = (torch.autograd.grad(x, list(student.parameters()), retain_graph=True) for x in (loss, expected))
        for a, e in zip(*gradients, strict=True):
            check_close(f"gradient, {rest}", a, e, 1e-4)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    model, calls = teacher(), []
    whole = write_teacher_cache(model, FEW, tmp_path / "whole", **SETTINGS)

    def count(*args: object) -> None:
        calls.append(1)
        if len(calls) == 4:  # after the check of the head and two of the first shard's batches
            raise Interrupted

    hook = model.get_output_embeddings().register_forward_pre_hook(count)
    try:
        with pytest.raises(Interrupted):
            write_teacher_cache(model, FEW, tmp_path / "cut", **SETTINGS)
        with pytest.raises(ValueError, match="has 1 of 3 shards: run the command that made it again"):
            TeacherCache(tmp_path / "cut")
        before = len(calls)
        resumed = write_teacher_cache(model, FEW, tmp_path / "cut", **SETTINGS)
        assert len(calls) - before == 1 + 3, "the batches of the first shard were computed again"
    finally:
        hook.remove()
    for i, row in enumerate(FEW):
        for a, b in zip(resumed.row(i, row), whole.row(i, row), strict=True):
            assert torch.equal(a, b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    write_teacher_cache(teacher(), FEW, path, tokenizer=tokenizer(), **SETTINGS)
    return path


OTHER = [*FEW[:11], ROWS[20]]
BATCH = SequenceCollator()(FEW[:2])
REFUSED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "fewer rows": ("cache is of 12 rows, and the data set has 11", lambda f: TeacherCache(f).join(FEW[:11])),
    "other tokens": ("row 11 has other tokens than the cache's", lambda f: TeacherCache(f).join(OTHER)),
    "other order": ("row 0 has other tokens", lambda f: TeacherCache(f).join(FEW[::-1])),
    "one row": ("row 3 has other tokens", lambda f: TeacherCache(f).join([*FEW[:3], FEW[4], *FEW[4:]])[3]),
    "tokenizer": ("has another vocabulary", lambda f: TeacherCache(f).join(FEW, tokenizer(LETTERS[::-1]))),
    "vocabulary": (
        f"vocabulary of {VOCABULARY} tokens, and the student's has 99",
        lambda f: SequenceDistillation(llama(vocabulary=99), TeacherCache(f)),
    ),
    "temperature": (
        r"made at temperature 1.0, and temperature=2.0: with rest='bucket' they must be the same",
        lambda f: SequenceDistillation(llama(), TeacherCache(f), temperature=2.0),
    ),
    "written with other rows": (
        "row 11 has other tokens",
        lambda f: write_teacher_cache(teacher(), OTHER, f, tokenizer=tokenizer(), **SETTINGS),
    ),
    "written with other settings": (
        r"other settings: top_k 5 \(asked: 6\), vocabulary '\w+' \(asked: None\); give another folder",
        lambda f: write_teacher_cache(teacher(), FEW, f, **SETTINGS | {"top_k": 6}),
    ),
    "no cache": ("is no teacher's cache", lambda f: TeacherCache(f.parent)),
    "k": (
        f"top_k must be a whole number from 1 to {VOCABULARY}, got 1000",
        lambda f: write_teacher_cache(teacher(), FEW, f, top_k=1000),
    ),
    "no rows": ("there are no rows", lambda f: write_teacher_cache(teacher(), [], f)),
    "dtype": (
        "dtype must be one of 'float32', 'float16'",
        lambda f: write_teacher_cache(teacher(), FEW, f, dtype="int8"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_cache_is_refused(name: str, folder: Path) -> None:
    message, call = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(folder)


def test_a_batch_without_the_caches_columns_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"no teacher_ids, teacher_logprobs: train on cache.join\(dataset\)"):
        SequenceDistillation(llama(), TeacherCache(folder))(BATCH)


def test_the_format_is_checked(tmp_path: Path) -> None:
    (tmp_path / "teacher.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="of format 99, and this kdkernels reads 1"):
        TeacherCache(tmp_path)


def padded(columns: int) -> torch.nn.Module:
    """The teacher with tokens that do not exist, and are likely."""
    model = llama(32, 2, seed=1)
    model.load_state_dict(teacher().state_dict())
    model.resize_token_embeddings(VOCABULARY + columns)
    model.get_output_embeddings().weight.data[VOCABULARY:] = 1.0
    return model


def test_padded_vocabularies_are_cut(tmp_path: Path) -> None:
    cache = write_teacher_cache(padded(6), FEW[:2], tmp_path / "a", top_k=3, vocab_size=VOCABULARY)
    expected = write_teacher_cache(teacher(), FEW[:2], tmp_path / "b", top_k=3)
    for a, b in zip(cache.row(0, FEW[0]), expected.row(0, FEW[0]), strict=True):
        torch.testing.assert_close(a, b)


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXT[:900].splitlines()))
    options = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "text.txt"),
        "--output",
        str(tmp_path / "out"),
    ]
    command = ["teacher", *options, "--top-k", "7", "--max-length", "16", "--rows-per-shard", "9"]
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "_top_k", mock.Mock(side_effect=[{"ids": torch.ones(1)}, KeyboardInterrupt]))
        assert cli.main(command) == 130
    assert "interrupted; saved: 1 of the shards, in" in capsys.readouterr().err
    (tmp_path / "out" / "shard-00000.safetensors").unlink()  # that of the mock
    assert cli.main(command) == 0
    rows = token_rows(tmp_path / "text.txt", tokenizer(), 16)
    assert f"{len(rows)} rows, 7 tokens of {VOCABULARY} at each position" in capsys.readouterr().out
    joined = TeacherCache(tmp_path / "out").join(rows, tokenizer())
    assert joined[3]["teacher_ids"].shape == (len(rows[3]["input_ids"]), 7)
    assert cli.main(["teacher", *options, "--top-k", "8"]) == 2
    assert "top_k 7 (asked: 8)" in capsys.readouterr().err.splitlines()[-1]


BAD_LINES = {
    '{"text": 1': "line 2 is no JSON",
    '{"prompt": "a"}': "line 2 must be an object with 'text' or 'input_ids'",
    '{"text": "a"}': "line 2 is text: give the tokenizer",
    '{"input_ids": []}': "line 2 must have one or more tokens",
    '{"input_ids": [1, 2], "labels": [1]}': "and a label for each",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_rows_of_a_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input_ids": [3, 1, 2], "labels": [-100, 1, 2], "id": 7}\n\n')
    assert token_rows(path, max_length=2) == [{"input_ids": [3, 1], "labels": [-100, 1]}]
    path.write_text(f'{{"input_ids": [0]}}\n{line}\n')
    with pytest.raises(ValueError, match=BAD_LINES[line]):
        token_rows(path)


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        token_rows(tmp_path / "empty.txt", tokenizer())
    with pytest.raises(ValueError, match=r"must be a \.txt or \.jsonl file"):
        token_rows(tmp_path / "rows.csv")
