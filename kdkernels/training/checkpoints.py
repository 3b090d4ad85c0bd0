"""Checkpoints: one safetensors file each, with JSON in its header; written whole or not at all, read without pickle."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .runs import CHECKPOINTS, write_whole

FORMAT, KEPT = "2", 2  # the one before the newest stays, for a disk that damages the newest

logger = logging.getLogger("kdkernels")


class CheckpointError(ValueError):
    """A file that is no whole checkpoint."""


def write(folder: Path, epoch: int, state: Mapping[str, Any]) -> None:
    """Keep ``state``, nested dicts, lists and tuples of tensors and plain values, and drop checkpoints before the last.

    Raises:
        TypeError: a value that is none of these; nothing is written.
        WriteError: the disk is full. The checkpoints before are there.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(state, "state", tensors))
    tensors = _apart(tensors)
    header = {"format": FORMAT, "state": text, "crc32": _crc32(text, tensors)}
    write_whole(folder / CHECKPOINTS.replace("*", f"{epoch:06d}"), lambda path: save_file(tensors, path, header))
    for old in found(folder)[KEPT:]:
        old.unlink()


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted(folder.glob(CHECKPOINTS), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, or None where there is none at all; each one that is refused is logged.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    paths = found(folder)
    for path in paths:
        if not (reason := _damage(path)):
            return path
        logger.warning("%s; the one before it is taken", reason)
    if paths:
        raise CheckpointError(f"{reason}, and {folder} has no other that is: overwrite the run")
    return None


def _damage(path: Path) -> str:
    try:
        read(path)
    except CheckpointError as error:
        return str(error)
    return ""


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint.

    Raises:
        CheckpointError: the file is cut, damaged, or of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole checkpoint: {error}") from None
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of format {header.get('format')!r}, and this kdkernels reads {FORMAT!r}")
    if header.get("crc32") != _crc32(header.get("state", ""), tensors):
        raise CheckpointError(f"{path} is no whole checkpoint: its checksum is another")
    return _unpack(json.loads(header["state"]), tensors)


def _crc32(text: str, tensors: Mapping[str, Tensor]) -> str:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        x = tensors[name]
        value = zlib.crc32(f"{name} {x.dtype} {tuple(x.shape)}".encode(), value)
        value = zlib.crc32(x.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in memory of its own: tied weights are one tensor with several names."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON, where a list is ["dict" | "list" | "tuple" | "tensor", ...]; keys keep their types."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        tensors[path] = value
        return ["tensor", path]
    if isinstance(value, Mapping):
        return ["dict", *([key, _pack(item, f"{path}.{key}", tensors)] for key, item in value.items())]
    if isinstance(value, (Sequence, np.ndarray)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, *(_pack(item, f"{path}.{i}", tensors) for i, item in enumerate(value))]
    raise TypeError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold: give numbers, text or tensors"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, *items = value
    if kind == "tensor":
        return tensors[items[0]]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in items}
    return (tuple if kind == "tuple" else list)(_unpack(item, tensors) for item in items)
