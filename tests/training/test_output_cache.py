"""A teacher's outputs on disk: the same weights as without, and refused where they would not be."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checking import DEVICE
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from training_tools import images, network

from kdkernels.training import Distillation, fit, output_cache
from kdkernels.training.data.augment import CropFlip
from kdkernels.training.runs import WriteError

ROWS, BATCH = 22, 4


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_cache, "SHARD_BYTES", 1)  # one batch in each


def dataset() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(*(x.cpu() for x in images(ROWS)))


class Counting(nn.Module):
    """A teacher that counts its passes; its logits are not its only output."""

    def __init__(self, seed: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.passes = network(6, 7, 8), 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        return {"logits": self.net(x)}


def train(
    method: str, folder: Path | None, data: Any = None, teacher: nn.Module | None = None, **options: Any
) -> tuple[dict[str, Tensor], int]:
    """What the run ends with, and the teacher's passes."""
    teacher = Counting() if teacher is None else teacher
    torch.manual_seed(0)
    module = Distillation(teacher, network(), method, output="logits", example=images(2)[0])
    loader = data if isinstance(data, DataLoader) else DataLoader(data or dataset(), BATCH, shuffle=True)
    before = teacher.passes
    fit(module, loader, epochs=2, teacher_cache=folder, progress=False, **options)
    return module.state_dict(), teacher.passes - before


@pytest.mark.parametrize(("method", "accumulate"), [("kd", 1), ("sp", 2), ("amd+ickd", 1), ("mlkd+kd", 1)])
def test_weights_are_those_without_a_cache(tmp_path: Path, method: str, accumulate: int) -> None:
    plain, passes = train(method, None, accumulate=accumulate)
    assert passes == 12 * accumulate  # a relational method's micro-batches run twice
    written, passes = train(method, tmp_path, accumulate=accumulate)
    assert passes == 1 + 6  # a look at the first images; each shard
    read, passes = train(method, tmp_path, accumulate=accumulate)
    assert passes == 1
    for state in (written, read):
        assert state.keys() == plain.keys()
        assert [name for name, x in plain.items() if not torch.equal(x, state[name])] == []
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"shard-0000{i}.safetensors" for i in range(6)), "teacher.json"]


def test_workers_read_it_too(tmp_path: Path) -> None:
    loader = DataLoader(dataset(), BATCH, shuffle=True, num_workers=1)
    plain, _ = train("kd", None)
    assert torch.equal(train("kd", tmp_path, loader)[0]["student.fc.weight"], plain["student.fc.weight"])


class Noisy(Dataset[tuple[Tensor, int]]):
    """Images that are others from the given read on."""

    def __init__(self, reads: int) -> None:
        self.images, self.reads = dataset(), reads

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.reads -= 1
        return self.images[i][0] + torch.rand(()) * (self.reads < 0), self.images[i][1]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from dataset()


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        ("kd", Noisy(0), r"image 0 is another one each time it is read, as by augmentation: .*leave out teacher_cache"),
        ("kd", Noisy(60), r"image \d+ is not the one whose outputs are in .*augmentation"),
        ("stkd", None, "method STKD makes other images of each batch"),
        ("corsd+kd", None, "method Mixed makes other images of each batch"),
        ("kd", DataLoader(dataset(), BATCH, collate_fn=tuple), "without a collate_fn"),
    ],
)
def test_images_that_are_not_fixed_are_refused(tmp_path: Path, method: str, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(method, tmp_path, data)


def test_an_augmentation_is_refused(tmp_path: Path) -> None:
    module = Distillation(network(), network(), "kd", augment=CropFlip(1))
    with pytest.raises(ValueError, match="augment= makes other images of each batch"):
        fit(module, DataLoader(dataset(), BATCH), epochs=1, teacher_cache=tmp_path)


def test_a_method_without_a_teacher_has_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method Alone has no teacher"):
        fit(Distillation(None, network(), "alone"), DataLoader(dataset(), 4), epochs=1, teacher_cache=tmp_path)


def test_another_teacher_data_set_or_layer_is_refused(tmp_path: Path) -> None:
    train("kd", tmp_path)
    other = TensorDataset(dataset().tensors[0].flip(0), dataset().tensors[1])
    for options, message in (
        ({"teacher": Counting(3)}, r"a cache of other settings: weights '.*give another folder"),
        ({"method": "sp"}, r"other settings: layers \[\] \(asked: \['net.stages.2'\]\), shapes \[\[4\]\]"),
        ({"data": TensorDataset(*(x[:9] for x in dataset().tensors))}, r"rows 22 \(asked: 9\)"),
        ({"data": other}, r"image 0 is not the one whose outputs are in .*the data changed"),
        ({"mixed_precision": "bf16"}, r"precision 'no' \(asked: 'bf16'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train(**{"method": "kd", "folder": tmp_path, **options})
    changed = Counting()
    changed.net.fc.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    with pytest.raises(ValueError, match="outputs of the first images are not those in"):
        train("kd", tmp_path, teacher=changed)


def test_a_full_disk_leaves_whole_shards_and_it_goes_on(tmp_path: Path) -> None:
    plain, _ = train("kd", None)
    real, calls = output_cache.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        real(tensors, path)
        if len(calls) == 3:
            os.truncate(path, 50)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        mock.patch.object(output_cache, "save_file", full),
        pytest.raises(WriteError, match=r"shard-00002.safetensors cannot be written: No space left"),
    ):
        train("kd", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("shard*")) == [f"shard-0000{i}.safetensors" for i in (0, 1)]
    state, passes = train("kd", tmp_path)
    assert passes == 1 + 4
    assert torch.equal(state["student.fc.weight"], plain["student.fc.weight"])
    usage = mock.Mock(free=100)
    with (
        mock.patch.object(output_cache.shutil, "disk_usage", return_value=usage),
        pytest.raises(WriteError, match=r"teacher_cache: 0.0 GB are needed in .*, and 0.0 GB are free"),
    ):
        train("kd", tmp_path / "other")


def test_outputs_come_with_their_batch(tmp_path: Path) -> None:
    teacher, seen = Counting(), []
    module = Distillation(teacher, network(), "kd", output="logits")
    real = module.method.terms

    def terms(student: Any, known: Any, batch: Any) -> dict[str, Tensor]:
        seen.append((batch.images, known.logits))
        return real(student, known, batch)

    with mock.patch.object(module.method, "terms", terms):
        fit(module, DataLoader(dataset(), BATCH), epochs=1, teacher_cache=tmp_path, progress=False)
    for x, logits in seen:
        assert logits.device.type == torch.device(DEVICE).type
        torch.testing.assert_close(logits, teacher.net(x))
