"""Data sets through Hugging Face datasets: published ones, image folders, parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, get_worker_info

from . import Split


class Known(NamedTuple):
    """A published data set: its place on the hub, the mean and deviation that its users agree on, augmentation."""

    place: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str


KNOWN = {
    "cifar10": Known("uoft-cs/cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "crop-flip"),
    # RepDistiller's figures, with which the teachers that it publishes were trained
    "cifar100": Known("uoft-cs/cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "crop-flip"),
    "imagenet-1k": Known("ILSVRC/imagenet-1k", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "resized-crop-flip"),
}
TEST = ("validation", "valid", "val", "test")  # the first that there is; ImageNet's test split has no labels
LABELS = ("label", "fine_label", "labels")
SAMPLE, MEASURED, STREAMED = 16, 2000, 256  # images to see their size, to measure mean and deviation, in a stream
SMALL, SIDE = 64, 224  # images that are all alike and no larger keep their size; else this
MARGIN = 256 / 224  # a larger image's shorter side when its middle is cut out, over what is cut out
IN_MEMORY = 2**30  # bytes as float32; a larger set is read image by image
BUFFER = 10_000  # images among which a stream is shuffled
WORKERS = 4


class Reader(NamedTuple):
    """What is made of a row: a standardised image (C, H, W) and its label."""

    image: str  # the two columns
    label: str
    mode: str  # "L" or "RGB"
    shape: tuple[int, int]
    mean: np.ndarray
    std: np.ndarray

    def pixels(self, image: Any) -> np.ndarray:
        """(C, H, W) from 0 to 1: the shorter side resized, the middle cut out."""
        from PIL import Image

        image, (height, width) = image.convert(self.mode), self.shape
        if image.size != (width, height):
            scale = max(height / image.height, width / image.width) * (MARGIN if height > SMALL else 1)
            size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            image = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
        array = np.asarray(image, np.float32).reshape(height, width, -1) / 255
        return array.transpose(2, 0, 1)

    def read(self, row: dict[str, Any]) -> tuple[Tensor, int]:
        label = row[self.label]
        if label is None or label < 0:  # as in a test split whose labels are secret
            raise ValueError(f"an image has no label: column {self.label} holds {label}")
        standardised = (self.pixels(row[self.image]) - self.mean[:, None, None]) / self.std[:, None, None]
        return torch.from_numpy(np.ascontiguousarray(standardised, np.float32)), int(label)


class Rows(Dataset[Any]):
    """Images that are read when they are asked for."""

    def __init__(self, rows: Any, reader: Reader) -> None:
        self.rows, self.reader = rows, reader
        self.targets = torch.as_tensor(np.asarray(rows[reader.label]))  # for triplets and subsets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.reader.read(self.rows[index])


class Stream(IterableDataset[Any]):
    """Images in the order in which they come, shuffled over a buffer when they are for training."""

    def __init__(self, rows: Any, reader: Reader, count: int, shuffle: bool) -> None:
        self.rows, self.reader, self.count, self.shuffle = rows, reader, count, shuffle

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        rows = self.rows
        if self.shuffle:
            worker = get_worker_info()  # all workers need one seed, and another one in each epoch
            seed = int(torch.randint(2**31, ())) if worker is None else worker.seed - worker.id
            rows = rows.shuffle(seed=seed % 2**32, buffer_size=BUFFER)
        yield from map(self.reader.read, rows)


def load_hub(name: str, *, size: int | None = None, label: str | None = None, streaming: bool = False) -> Split:
    """A data set with a split "train", and one of "validation", "valid", "val" and "test" to test on.

    Args:
        name: cifar10, cifar100, imagenet-1k, another name on the hub, or a folder: of parquet files, or of images in
            train/CLASS/ and test/CLASS/. A folder called cifar100, or one of the other two, is that data set, with its
            usual mean, deviation and augmentation; other sets are standardised by up to 2000 of their images.
        size: height and width of the images; None: their own where they are all alike and at most 64, else 224. An
            image's shorter side is resized, for more than 64 pixels with a margin of 1/7, and its middle is cut out.
        label: the column of labels; None: the only one, or ``label`` or ``fine_label``.
        streaming: images are fetched as they are needed, shuffled over 10,000 of them.

    Raises:
        ValueError: no such data set, splits or columns; labels that are no classes; a stream of unknown length.
    """
    folder = Path(name).is_dir()
    known = KNOWN.get(Path(name).name)
    splits = _open(name if folder or known is None else known.place, streaming)
    test_name = next((split for split in TEST if split in splits), None)
    if "train" not in splits or test_name is None:
        raise ValueError(f"hf:{name} needs a split train and one of {', '.join(TEST)}, and has {', '.join(splits)}")
    image, label = _columns(name, splits["train"].features, label)
    train, test = (_as_images(splits[split], image) for split in ("train", test_name))
    sample = [row[image] for row in _some(train, SAMPLE, streaming)]
    reader = _reader(image, label, sample, size)
    if known and reader.mode == "RGB":
        reader = reader._replace(mean=np.array(known.mean), std=np.array(known.std))
    else:
        reader = _measured(reader, _some(train, STREAMED if streaming else MEASURED, streaming))
    classes = _classes(name, label, [train] if streaming else [train, test])
    augment = known.augment if known else "none"
    sets = [_dataset(name, rows, reader, streaming, shuffle=rows is train) for rows in (train, test)]
    workers = 0 if isinstance(sets[0], TensorDataset) else 1 if streaming else WORKERS
    channels = len(reader.mean)
    return Split(sets[0], sets[1], channels, classes, augment, ("medium_student", "medium_teacher"), workers)


def _open(name: str, streaming: bool) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"hf: data sets need pip install '.[data]' in a checkout of kdkernels: {error}") from None
    try:
        return dict(datasets.load_dataset(name, streaming=streaming))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"hf:{name} cannot be loaded: {reason}") from None


def _columns(name: str, features: Any, label: str | None) -> tuple[str, str]:
    """The columns of images and of labels."""
    if features is None:
        raise ValueError(f"hf:{name} does not say what its columns hold: load it without streaming")
    images = [column for column, feature in features.items() if _holds_images(feature)]
    others = [column for column in features if column not in images]
    if len(images) != 1:
        raise ValueError(f"hf:{name} needs one column of images, and has {', '.join(images) or 'none'} of {others}")
    found = [column for column in LABELS if column in others] or (others if len(others) == 1 else [])
    label = label or (found[0] if found else LABELS[0])
    if label not in others:
        raise ValueError(f"hf:{name} has no label column {label!r}: name one of {', '.join(others)}")
    return images[0], label


def _holds_images(feature: Any) -> bool:
    from datasets import Image

    return isinstance(feature, Image) or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})


def _as_images(rows: Any, column: str) -> Any:
    """Files that another program wrote hold bytes that nobody said were images."""
    from datasets import Image

    return rows if isinstance(rows.features[column], Image) else rows.cast_column(column, Image())


def _some(rows: Any, count: int, streaming: bool) -> Iterable[dict[str, Any]]:
    """So many rows: the first of a stream, else evenly spread."""
    if streaming:
        return islice(rows, count)
    count = min(count, len(rows))
    return (rows[i * len(rows) // count] for i in range(count))


def _reader(image: str, label: str, sample: list[Any], size: int | None) -> Reader:
    sizes = {(x.height, x.width) for x in sample}
    alike = len(sizes) == 1 and max(*sizes.copy().pop()) <= SMALL
    shape = (size, size) if size else next(iter(sizes)) if alike else (SIDE, SIDE)
    mode = "L" if all(x.mode in ("1", "L") for x in sample) else "RGB"
    channels = len(mode)  # one, or three
    return Reader(image, label, mode, shape, np.zeros(channels), np.ones(channels))


def _measured(reader: Reader, rows: Iterable[dict[str, Any]]) -> Reader:
    images = [reader.pixels(row[reader.image]) for row in rows]
    mean = np.asarray(np.mean([x.mean((1, 2)) for x in images], 0, dtype=np.float64))
    square = np.asarray(np.mean([(x**2).mean((1, 2)) for x in images], 0, dtype=np.float64))
    return reader._replace(mean=mean, std=np.sqrt(np.maximum(square - mean**2, 1e-12)))


def _classes(name: str, label: str, splits: list[Any]) -> int:
    feature = splits[0].features[label]
    if (named := getattr(feature, "num_classes", None)) is not None:
        count = int(named)
    elif not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise ValueError(f"hf:{name}: column {label} must hold classes as whole numbers, it holds {feature}")
    else:
        count = 0
    if not hasattr(splits[0], "__len__"):  # a stream
        if not count:
            raise ValueError(f"hf:{name}: column {label} does not say how many classes there are: leave out streaming")
        return count
    values = np.concatenate([np.asarray(split[label]) for split in splits])
    if values.dtype.kind not in "iu" or values.min() < 0:
        raise ValueError(f"hf:{name}: column {label} has images without a label, or a negative one")
    return count or int(values.max()) + 1


def _dataset(name: str, rows: Any, reader: Reader, streaming: bool, shuffle: bool) -> Dataset[Any]:
    if streaming:
        told = (rows.info.splits or {}).get(str(rows.split))
        if told is None or not told.num_examples:
            raise ValueError(f"hf:{name} does not say how many images {rows.split} has: load it without streaming")
        return Stream(rows, reader, told.num_examples, shuffle)
    if len(rows) * len(reader.mean) * reader.shape[0] * reader.shape[1] * 4 > IN_MEMORY:
        return Rows(rows, reader)
    images, labels = torch.empty(len(rows), len(reader.mean), *reader.shape), torch.empty(len(rows), dtype=torch.long)
    for i, row in enumerate(rows):
        images[i], labels[i] = reader.read(row)
    return TensorDataset(images, labels)
