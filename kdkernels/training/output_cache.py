"""A teacher's outputs for fixed images, written once, read in every epoch and by every later run.

DIR/teacher.json              what the shards are of: rows, layers, shapes, precision, the teacher's weights
DIR/shard-00000.safetensors   logits, features.0 .. (rows, ...) as the teacher returned them, and the images' hashes;
                              (rows, views, ...) where the method makes so many of each image
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from .checks import check_batch
from .distillation import Distillation
from .loaders import over
from .methods import Outputs
from .runs import WriteError, write_whole
from .shards import begin, check_whole, number_of_shards, shard_path
from .taps import unwrap

FORMAT = "outputs 1"
SHARD_BYTES = 64 * 2**20
MOST_OF_THE_DISK = 0.9  # of what is free
MAPPED = 1024  # shards at a time
PROBED = 8  # images that are read twice before anything else

Known = tuple[Tensor, Tensor, None, Outputs]  # a batch: images, labels, no negatives' labels, the teacher's outputs


class NoSpaceError(WriteError):
    """The outputs would fill the disk; nothing was written."""


class _Together:
    """Holds back a process' error until ``check``, where it is everybody's: nobody waits for one that has failed."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> _Together:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self.error = error
        return self.error is not None

    def check(self) -> None:
        told = next(filter(None, gather_object(["" if self.error is None else str(self.error)])), "")
        if self.error is not None:
            raise self.error
        if told:
            raise ValueError(f"teacher_cache: {told}, in another process")


def with_outputs(
    distillation: Distillation, loader: DataLoader[Any], folder: Path, accelerator: Accelerator
) -> DataLoader[Any]:
    """The loader with the teacher's outputs in its batches. What is missing of them in ``folder`` is written first.

    Raises:
        ValueError: images that are not the same in every epoch, as far as a look at a few of them shows; a method that
            changes them; no teacher; a loader whose data set or collate_fn does not allow it; a cache of another
            teacher, of other layers or of other images.
        OSError: the disk is full, or too small. Whole shards stay, and the same call goes on from there.
    """
    if reason := refusal(distillation, loader):
        raise ValueError(f"teacher_cache: {reason}")
    distillation.to(accelerator.device)
    first = _first(loader)[0]
    size = loader.batch_size or 32
    teacher = partial(_outputs, distillation, accelerator, size)
    outputs = teacher(first)
    settings = _settings(distillation, outputs, len(loader.dataset), size, accelerator.mixed_precision)  # type: ignore[arg-type]
    with accelerator.main_process_first(), _Together() as together:
        settings = begin(folder, settings, free=["rows_per_shard"])
    together.check()
    todo = [n for n in range(number_of_shards(settings)) if not shard_path(folder, n).is_file()]
    _check_space(folder, len(todo), outputs, settings)
    accelerator.wait_for_everyone()  # all have the same list, of which each process takes a part
    with _Together() as together:
        for number in todo[accelerator.process_index :: accelerator.num_processes]:
            shard = _shard(_batches(loader, number, settings, size), teacher)
            write_whole(shard_path(folder, number), partial(save_file, shard))
    together.check()
    check_whole(folder, settings)
    known = _WithOutputs(loader.dataset, folder, settings)
    _compare(known, first, outputs)
    return over(loader, known, partial(_collate, views=distillation.method.fixed_views))


def key(distillation: Distillation) -> str:
    """A short name of what a method needs of its teacher: methods that need the same may share a folder."""
    needed = f"{distillation.teacher_layers} {distillation.method.fixed_views}"
    return blake2b(needed.encode(), digest_size=6).hexdigest()


def refusal(distillation: Distillation, loader: Any) -> str:
    """Why the teacher's outputs cannot be kept; "" if they can, as far as a look at a few images shows."""
    method, dataset = distillation.method, loader.dataset
    if distillation.teacher is None:
        return f"method {type(method).__name__} has no teacher whose outputs could be kept"
    if loader.collate_fn is not default_collate or not hasattr(dataset, "__len__"):
        return "needs a DataLoader over a data set with len() and [i], without a collate_fn, which may change images"
    if not method.fixed_views or distillation.augment is not None:
        who = f"method {type(method).__name__}" if distillation.augment is None else "augment="
        return f"{who} makes other images of each batch: {LEAVE}"
    places = [i * len(dataset) // PROBED for i in range(PROBED)] if len(dataset) > PROBED else range(len(dataset))
    for i in places:
        if image_hash(dataset[i][0]) != image_hash(dataset[i][0]):
            return f"image {i} is another one each time it is read, as by augmentation: {LEAVE}"
    check_batch(_first(loader), "train_loader")
    return ""


LEAVE = "the teacher's outputs are not the same in every epoch; leave out teacher_cache"


def _first(loader: DataLoader[Any]) -> Any:
    dataset: Any = loader.dataset
    return default_collate([dataset[i] for i in range(min(2, len(dataset)))])


def image_hash(image: Any) -> int:
    """64 bits of an image's numbers, dtype and shape."""
    x = torch.as_tensor(image).detach().cpu().contiguous()
    state = blake2b(f"{x.dtype}{tuple(x.shape)}".encode(), digest_size=8)
    state.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(state.digest(), "little", signed=True)


def weights_hash(model: nn.Module) -> str:
    """Of all parameters and buffers that are saved, with their names."""
    state = blake2b(digest_size=16)
    for name, x in unwrap(model).state_dict().items():
        if isinstance(x, Tensor):
            state.update(f"{name}{image_hash(x)}".encode())
    return state.hexdigest()


def _settings(distillation: Distillation, outputs: Outputs, rows: int, size: int, precision: str) -> dict[str, Any]:
    assert distillation.teacher is not None
    row = sum(x[0].numel() * x.element_size() for x in (outputs.logits, *outputs.features))
    return {
        "format": FORMAT,
        "rows": rows,
        "rows_per_shard": size * max(1, SHARD_BYTES // (size * row)),
        "layers": distillation.teacher_layers,
        "shapes": [list(x.shape[1:]) for x in (outputs.logits, *outputs.features)],
        "precision": precision,
        "teacher": type(unwrap(distillation.teacher)).__name__,
        "weights": weights_hash(distillation.teacher),
    }


def _check_space(folder: Path, shards: int, outputs: Outputs, settings: dict[str, Any]) -> None:
    row = sum(x[0].numel() * x.element_size() for x in (outputs.logits, *outputs.features))
    needed = row * min(shards * settings["rows_per_shard"], settings["rows"])
    free = shutil.disk_usage(folder).free
    if shards and needed > MOST_OF_THE_DISK * free:
        raise NoSpaceError(
            f"teacher_cache: {needed / 1e9:.1f} GB are needed in {folder}, and {free / 1e9:.1f} GB are free"
        )


@torch.no_grad()
def _outputs(distillation: Distillation, accelerator: Accelerator, size: int, images: Tensor) -> Outputs:
    """The teacher's, in batches of the training's size: products may be rounded otherwise in smaller ones."""
    rows = len(images)
    images = images.to(accelerator.device)
    images = images[torch.arange(max(size, rows), device=images.device) % rows]
    views = distillation.method.fixed_views
    images = distillation.method.prepare(images, torch.zeros(len(images), dtype=torch.int64)).images
    with accelerator.autocast():
        outputs = distillation.teacher_outputs(images)

    def kept(x: Tensor) -> Tensor:
        x = x[: rows * views].cpu()
        return x if views == 1 else x.unflatten(0, (rows, views))

    return Outputs(kept(outputs.logits), [kept(x) for x in outputs.features])


def _batches(loader: DataLoader[Any], number: int, settings: dict[str, Any], size: int) -> Iterator[Tensor]:
    start = number * settings["rows_per_shard"]
    rows = range(start, min(start + settings["rows_per_shard"], settings["rows"]))
    part: Dataset[Any] = Subset(loader.dataset, rows)
    for batch in DataLoader(part, size, num_workers=loader.num_workers, worker_init_fn=loader.worker_init_fn):
        yield batch[0]


def _shard(batches: Iterator[Tensor], teacher: Any) -> dict[str, Tensor]:
    parts, hashes = [], []
    for images in batches:
        parts.append(teacher(images))
        hashes += [image_hash(image) for image in images]
    columns = zip(*([x.logits, *x.features] for x in parts), strict=True)
    tensors = [torch.cat(column) for column in columns]
    return {name: x.contiguous() for name, x in zip(_names(len(tensors)), tensors, strict=True)} | {
        "hashes": torch.tensor(hashes)
    }


def _names(count: int) -> list[str]:
    return ["logits", *(f"features.{i}" for i in range(count - 1))]


class _WithOutputs(Dataset[tuple[Any, Any, list[Tensor]]]):
    """(image, label, [logits, features ..]); each image must be the one that the teacher saw."""

    def __init__(self, dataset: Any, folder: Path, settings: dict[str, Any]) -> None:
        self.dataset, self.folder = dataset, folder
        self.rows, self.names = settings["rows_per_shard"], _names(len(settings["shapes"]))
        self.shards: dict[int, dict[str, Tensor]] = {}  # that were read last, mapped into memory

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Any, Any, list[Tensor]]:
        image, label = self.dataset[i]
        shard, place = divmod(range(len(self))[i], self.rows)
        tensors = self._open(shard)
        if int(tensors["hashes"][place]) != image_hash(image):
            raise ValueError(
                f"teacher_cache: image {i} is not the one whose outputs are in {self.folder}: the data changed, or "
                "images are not the same in every epoch (augmentation); give another folder, or leave it out"
            )
        return image, label, [tensors[name][place] for name in self.names]

    def _open(self, shard: int) -> dict[str, Tensor]:
        if shard not in self.shards:
            if len(self.shards) == MAPPED:
                self.shards.pop(next(iter(self.shards)))
            self.shards[shard] = load_file(shard_path(self.folder, shard))
        return self.shards[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"shards": {}}  # a worker maps them itself


def _collate(samples: Sequence[tuple[Any, Any, list[Tensor]]], views: int) -> Known:
    images, labels = default_collate([sample[:2] for sample in samples])
    columns = [torch.stack(column) for column in zip(*(sample[2] for sample in samples), strict=True)]
    logits, *features = [x.flatten(0, 1) for x in columns] if views > 1 else columns
    return images, labels, None, Outputs(logits, features)


def _compare(known: _WithOutputs, images: Tensor, outputs: Outputs) -> None:
    """The weights' hash does not see a teacher whose code has changed."""
    kept = _collate([known[i] for i in range(len(images))], views=1)[3]
    for a, b in zip((kept.logits, *kept.features), (outputs.logits, *outputs.features), strict=True):
        if not torch.allclose(
            a.double(), b.double(), rtol=1e-2, atol=1e-2 * float(b.double().abs().max()), equal_nan=True
        ):
            raise ValueError(
                f"the teacher's outputs of the first images are not those in {known.folder}: give another folder"
            )
