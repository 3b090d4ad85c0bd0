"""A network whose weights are in a file: what ``eval`` and ``export`` start from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from . import data, record
from .models import load_weights, make_model, output_of
from .outputs import read
from .setting import TEACHER, TEST_BATCH

DEPTH = 4  # folders above a file of weights in which the run's options may be
OF_DATA = ("data", "image_size", "label_column")


class Logits(nn.Module):
    """A network that returns its logits alone, whatever it returned."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.output = model, output_of(name)

    def forward(self, images: Any) -> Any:
        return read(self.model(images), self.output, "model")[0]


def complete(args: argparse.Namespace, data: bool = True) -> None:
    """Fill in the network, and the data, that were not named from the options of the run that the weights are of.

    Raises:
        ValueError: there is no such run, so that they must be named.
    """
    folders = list(args.weights.resolve().parents)[:DEPTH]
    options: dict[str, Any] = next(filter(None, (record.read(folder) for folder in folders)), {})
    taught = args.weights.resolve().parent.name == TEACHER
    args.model = args.model or options.get("teacher_model" if taught else "model")
    if args.data is None and data:
        for name in OF_DATA:
            setattr(args, name, getattr(args, name) or options.get(name))
    missing = [f"--{name}" for name in ("model", "data")[: 1 + data] if getattr(args, name) is None]
    if missing:
        raise ValueError(f"{args.weights} is in no run's folder, which would say more: give {' and '.join(missing)}")


def split_of(args: argparse.Namespace) -> data.Split:
    return data.load(args.data, size=args.image_size, label=args.label_column, streaming=args.streaming)


def load(weights: Path, name: str, channels: int, classes: int) -> nn.Module:
    """The network in eval mode."""
    model = make_model(name, channels, classes)
    load_weights(model, weights)
    return model.eval()


def loader(split: data.Split, train: bool, workers: int | None) -> Any:
    workers = split.workers if workers is None else workers
    images = split.train if train else split.test
    return data.loader(images, TEST_BATCH[workers > 0], train=False, workers=workers)
