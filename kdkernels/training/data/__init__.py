"""Data sets: scikit-learn's digits, which come with the wheel, and .npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ..triplets import triplet_loader


class Split(NamedTuple):
    """Images (N, C, H, W) float32, standardised over the training set, and int64 labels (N,)."""

    train: TensorDataset
    test: TensorDataset
    channels: int
    classes: int


def load(source: str) -> Split:
    """ "digits", or the path of an .npz file with x_train, y_train, x_test, y_test; x is (N, H, W), (N, C, H, W) or
    (N, H, W, C) with at most four channels, y holds one whole number from 0 on per image. Where both the second and
    the last size could be the channels, they are the one that is 1 or 3, and where that is no answer it is an error."""
    if source == "digits":
        return digits()
    path = Path(source)
    if path.suffix != ".npz" or not is_zipfile(path):  # a cut or empty file is no zip file either
        raise ValueError(f"data must be 'digits' or an existing and whole .npz file, got {source!r}")
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


def labelled_subset(dataset: TensorDataset, per_class: int, seed: int) -> TensorDataset:
    """``per_class`` images of each class, drawn with that seed."""
    images, target = dataset.tensors
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in target.unique():
        members = order[target[order] == label]
        if len(members) < per_class:
            raise ValueError(f"class {int(label)} has {len(members)} images, {per_class} were asked for")
        chosen.append(members[:per_class])
    index = torch.cat(chosen)
    return TensorDataset(images[index], target[index])


def loader(dataset: TensorDataset, batch_size: int, *, train: bool, triplets: bool = False) -> DataLoader[Any]:
    """Batches of ``batch_size`` images; with ``triplets`` a third as many triplets, so as many images in a step."""
    # drop_last: relational losses mean something else on a rest of three images
    images = DataLoader(dataset, batch_size, shuffle=train, drop_last=train and len(dataset) >= batch_size)
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
