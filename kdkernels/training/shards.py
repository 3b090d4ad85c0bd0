"""A folder of shards, the rows of a data set in order: each written whole or not at all, beside what they are of.

DIR/teacher.json              the settings, JSON
DIR/shard-00000.safetensors   rows 0 .. rows_per_shard - 1
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .runs import write_whole

SETTINGS = "teacher.json"


def begin(folder: Path, settings: Mapping[str, Any], free: Iterable[str] = ()) -> dict[str, Any]:
    """Write the settings, or meet those that are there, where those named in ``free`` may be others; these return.

    Raises:
        ValueError: the folder has a cache of other settings.
        WriteError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if not path.is_file():
        text = json.dumps(settings, indent=1) + "\n"
        write_whole(path, lambda part: part.write_text(text))
        return dict(settings)
    there = read_settings(folder, settings["format"])
    compared = settings.keys() - set(free)
    if other := [
        f"{k} {there.get(k)!r} (asked: {settings[k]!r})"
        for k in settings
        if k in compared and there.get(k) != settings[k]
    ]:
        raise ValueError(f"{folder} has a cache of other settings: {', '.join(other)}; give another folder")
    return there


def read_settings(folder: Path, version: object) -> dict[str, Any]:
    """The settings of a cache of that format.

    Raises:
        ValueError: there are none, or of another format.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise ValueError(f"{folder} has no {SETTINGS}: it is no teacher's cache")
    settings = json.loads(path.read_text())
    if settings.get("format") != version:
        raise ValueError(f"{path} is of format {settings.get('format')!r}, and this kdkernels reads {version!r}")
    return settings


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def number_of_shards(settings: Mapping[str, Any]) -> int:
    return -(-settings["rows"] // settings["rows_per_shard"])


def check_whole(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a shard is missing."""
    shards = number_of_shards(settings)
    there = sum(shard_path(folder, number).is_file() for number in range(shards))
    if there < shards:
        raise ValueError(f"{folder} has {there} of {shards} shards: run the command that made it again")
