"""The folder of a run: nothing in it is overwritten unasked, and every file is written whole or not at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from .taps import unwrap

METRICS = "metrics.csv"
FILES = (METRICS, "last.safetensors", "best.safetensors")
CHECKPOINTS = "checkpoint-*.safetensors"
SHARDS = "shard-*.safetensors"  # of a teacher's cache


class WriteError(OSError):
    """A file of a run could not be written: the disk is full, or the folder is gone. What was there before is."""

    started = True  # so there may be something saved to tell of


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError if the folder holds a run that nobody asked to overwrite."""
    found = [path.name for path in _files(folder)]
    if found and not overwrite:
        raise FileExistsError(
            f"{folder} holds a run already ({', '.join(found)}): name another folder, go on with it (resume=True, "
            "--resume), or ask for it to be overwritten (overwrite=True, --overwrite)"
        )


def claim(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Make the folder for a run. Files of an earlier one go, so that none of them is taken for the new one's."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.part"):  # half written when a process was killed
        path.unlink()
    if not resume:
        check_free(folder, overwrite)
        for path in _files(folder):
            path.unlink()


def _files(folder: Path) -> list[Path]:
    return [*(path for name in FILES if (path := folder / name).exists()), *sorted(folder.glob(CHECKPOINTS))]


def save_student(folder: Path, student: nn.Module, names: Sequence[str]) -> None:
    """The student's weights under each of the names, "last" or "best"."""
    from safetensors.torch import save_model  # of the extra "train"

    student = unwrap(student)  # the keys of the network itself, compiled or not
    for name in names:
        write_whole(folder / f"{name}.safetensors", lambda path: save_model(student, str(path)))


def save_metrics(folder: Path, history: Sequence[dict[str, float]]) -> None:
    """Last of all: an epoch in metrics.csv is saved."""
    write_whole(folder / METRICS, lambda path: _table(path, history))


def _table(path: Path, history: Sequence[dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for row in history for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Through a file beside it, which takes its place when all of it is on the disk."""
    from safetensors import SafetensorError

    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WriteError(f"{path} cannot be written: {reason}") from error
    finally:
        part.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """The new name reaches the disk too, where a folder can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def saved(folder: Path) -> str:
    """One line on what is in a folder of runs, read from the disk."""
    if shards := len(list(folder.glob(SHARDS))):
        return f"saved: {shards} of the shards, in {folder}; the same command goes on from there"
    tables = sorted(folder.rglob(METRICS))
    if not tables:
        return f"nothing was saved in {folder}"
    if len(tables) > 3:
        return f"{len(tables)} runs are saved under {folder}"
    return "saved: " + ", ".join(f"{table.parent} up to epoch {_epochs(table)}" for table in tables)


def _epochs(table: Path) -> str:
    with table.open(newline="") as file:
        return [row["epoch"] for row in csv.DictReader(file)][-1]
