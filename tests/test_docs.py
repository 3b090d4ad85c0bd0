"""Every code block of the README runs, and its public names exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import kdkernels

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_blocks_run_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert isinstance(names["loss"], torch.Tensor)
    assert names["loss"].isfinite()


def test_every_public_name_is_mentioned() -> None:
    quiet = {"__version__", "BackendError"}
    missing = [name for name in kdkernels.__all__ if name not in README and name not in quiet]
    assert not missing
