"""Whether two runs ended alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels.training import checkpoints


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two states are not bitwise the same; seconds may differ."""
    if isinstance(a, Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [p for key in a if key != "seconds" for p in differing(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        return [p for i, pair in enumerate(zip(a, b, strict=True)) for p in differing(*pair, f"{path}.{i}")]
    return [] if a == b else [path]


def unlike(whole: Path, other: Path) -> list[str]:
    """In what two finished runs differ, in all that they saved."""
    ends = [checkpoints.read(checkpoints.found(folder)[0]) for folder in (whole, other)]
    names = ("last.safetensors", "best.safetensors")
    found = differing(*ends) + [name for name in names if (whole / name).read_bytes() != (other / name).read_bytes()]
    lines = [len((folder / "metrics.csv").read_text().splitlines()) for folder in (whole, other)]
    return found + ["metrics.csv"] * (lines[0] != lines[1]) + [path.name for path in other.glob("*.part")]
