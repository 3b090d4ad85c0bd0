"""Data sets: scikit-learn's digits, glyphs, .npz files, and whatever Hugging Face datasets loads."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any, NamedTuple, cast
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from ..triplets import labels_of, triplet_loader

TRAIN_GLYPHS, TEST_GLYPHS = 4000, 2000


class Split(NamedTuple):
    """Images (C, H, W) float32, standardised over the training set, and labels as whole numbers from 0 on.

    augment: how its training images are usually augmented, a name in ``AUGMENTATIONS``. models: a student and a teacher
    to start with. workers: processes that read it.
    """

    train: Any  # data sets of (image, label), each a TensorDataset where it fits into memory
    test: Any
    channels: int
    classes: int
    augment: str = "none"
    models: tuple[str, str] = ("small_student", "small_teacher")
    workers: int = 0


def load(source: str, *, size: int | None = None, label: str | None = None, streaming: bool = False) -> Split:
    """The training and test images of a data set.

    Args:
        source: "digits"; "glyphs"; "hf:NAME" or "hf:FOLDER", see ``data.hub``; or the path of an .npz file with
            x_train, y_train, x_test, y_test. There x is (N, H, W), (N, C, H, W) or (N, H, W, C) with at most four
            channels, y holds one whole number from 0 on per image. Where both the second and the last size could be
            the channels, they are the one that is 1 or 3, and where that is no answer it is an error.
        size, label, streaming: for "hf:": the images' height and width, the column of labels, and whether images are
            fetched as they are needed.

    Raises:
        ValueError: a source that does not exist, or that does not hold what it should.
    """
    if source.startswith("hf:"):
        from .hub import load_hub

        return load_hub(source.removeprefix("hf:"), size=size, label=label, streaming=streaming)
    if size is not None or label is not None or streaming:
        raise ValueError(f"an image size, a label column and streaming belong to hf: data sets, got {source!r}")
    if source == "digits":
        return digits()
    if source == "glyphs":
        from .glyphs import glyphs

        train, test = glyphs(TRAIN_GLYPHS, seed=0), glyphs(TEST_GLYPHS, seed=1)
        return Split(train, test, 3, 100, models=("medium_student", "medium_teacher"))
    path = Path(source)
    if path.suffix != ".npz" or not is_zipfile(path):  # a cut or empty file is no zip file either
        raise ValueError(
            f"data must be 'digits', 'glyphs', hf:NAME, hf:FOLDER or an existing and whole .npz file, got {source!r}"
        )
    with np.load(path) as arrays:
        missing = {"x_train", "y_train", "x_test", "y_test"} - set(arrays.files)
        if missing:
            raise ValueError(f"{source} lacks {sorted(missing)}; it has {sorted(arrays.files)}")
        return _split(*(arrays[name] for name in ("x_train", "y_train", "x_test", "y_test")))


def digits() -> Split:
    """8 x 8 scans of handwritten digits (UCI, 1797 images): 1000 to train on, 797 to test on, always the same."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x.reshape(-1, 8, 8)[order], y[order]
    return _split(x[:1000], y[:1000], x[1000:], y[1000:])


def labelled_subset(dataset: Any, per_class: int, seed: int) -> Any:
    """``per_class`` images of each class, drawn with that seed."""
    if isinstance(dataset, IterableDataset):
        raise ValueError("so many images of each class cannot be drawn from a stream")
    target = torch.as_tensor(labels_of(dataset))
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in target.unique():
        members = order[target[order] == label]
        if len(members) < per_class:
            raise ValueError(f"class {int(label)} has {len(members)} images, {per_class} were asked for")
        chosen.append(members[:per_class])
    index = torch.cat(chosen)
    if isinstance(dataset, TensorDataset):
        return TensorDataset(*(x[index] for x in dataset.tensors))
    return Subset(dataset, index.tolist())


def loader(
    dataset: Dataset[Any], batch_size: int, *, train: bool, triplets: bool = False, workers: int = 0
) -> DataLoader[Any]:
    """Batches of ``batch_size`` images; with ``triplets`` a third as many triplets, so as many images in a step."""
    # drop_last: relational losses mean something else on a rest of three images
    drop_last = train and len(cast(Sized, dataset)) >= batch_size
    shuffle = train and not isinstance(dataset, IterableDataset)  # a stream shuffles itself
    images = DataLoader(dataset, batch_size, shuffle, drop_last=drop_last, num_workers=workers)
    return triplet_loader(images) if triplets else images


def _split(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Split:
    train, test = _images("x_train", x_train), _images("x_test", x_test)
    if len(train) != len(y_train) or len(test) != len(y_test):
        raise ValueError(
            f"images and labels differ in number: {x_train.shape}, {y_train.shape}, {x_test.shape}, {y_test.shape}"
        )
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"images of x_train have {train.shape[1]} channels, those of x_test {test.shape[1]}")
    if not len(train) or not train.std() > 0:
        raise ValueError(f"x_train has {len(train)} images, all pixels the same: nothing to learn")
    mean, std = train.mean(), train.std()
    labels = [_labels("y_train", y_train), _labels("y_test", y_test)]
    return Split(
        TensorDataset((train - mean) / std, labels[0]),
        TensorDataset((test - mean) / std, labels[1]),
        train.shape[1],
        int(torch.cat(labels).max()) + 1,
    )


def _labels(name: str, y: np.ndarray) -> Tensor:
    if y.ndim != 1 and y.shape != (len(y), 1):
        raise ValueError(f"{name} must hold one label per image, got shape {y.shape} (one-hot? take its argmax)")
    # text and complex numbers have no "whole"; NaN is unequal to anything
    if y.dtype.kind not in "biuf" or not (y == np.floor(y)).all() or y.min(initial=0) < 0:
        raise ValueError(f"{name} must hold whole numbers from 0 on, got {y.dtype} {np.unique(y)[:5].tolist()} ...")
    return torch.as_tensor(y.astype(np.int64)).flatten()


def _channels_last(name: str, x: np.ndarray) -> bool:
    for usual in ((1, 2, 3, 4), (1, 3)):
        first, last = x.shape[1] in usual, x.shape[3] in usual
        if first != last:
            return last
    raise ValueError(f"{name} is {x.shape}: it is not clear whether its channels are the second or the last size")


def _images(name: str, x: np.ndarray) -> Tensor:
    images = torch.as_tensor(np.ascontiguousarray(x, dtype=np.float32))
    if not images.isfinite().all():
        raise ValueError(f"{name} has NaN or infinite pixels")
    if images.dim() == 3:
        return images[:, None]
    if images.dim() == 4 and min(images.shape[1], images.shape[3]) <= 4:
        return images.permute(0, 3, 1, 2).contiguous() if _channels_last(name, x) else images
    raise ValueError(f"{name} must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C <= 4, got {x.shape}")
