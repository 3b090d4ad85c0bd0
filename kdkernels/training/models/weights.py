"""Weights from files: safetensors, and PyTorch's own as RepDistiller and others publish their checkpoints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NESTED = ("model", "state_dict")  # of a checkpoint's entries, the one with the weights


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a .safetensors file, or a .pth or .pt file with a state dict or {"model": state dict, ...}.

    The file is read without running what it may hold (``torch.load(weights_only=True)``). "module." in front of all
    names, from DataParallel, is taken off.

    Raises:
        ValueError: no such file, not a checkpoint, or one for another network.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    weights = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    own = model.state_dict()
    # not in checkpoints of old versions of PyTorch, and of no use where momentum is a number
    expected = {name for name in own if name in weights or not name.endswith("num_batches_tracked")}
    if missing := sorted(expected - weights.keys()):
        raise ValueError(_differs(path, model, "lacks", missing))
    if more := sorted(weights.keys() - own.keys()):
        raise ValueError(_differs(path, model, "has also", more))
    shapes = {name: (tuple(w.shape), tuple(own[name].shape)) for name, w in weights.items()}
    if other := [f"{name} {given}, not {needed}" for name, (given, needed) in shapes.items() if given != needed]:
        raise ValueError(_differs(path, model, "has", other))
    model.load_state_dict(weights, strict=False)


def _differs(path: Path, model: nn.Module, verb: str, names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{path} holds no weights for this {type(model).__name__}: it {verb} {', '.join(names[:2])}{more}"


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([Namespace]):  # the options that RepDistiller's last checkpoint holds
            whole: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint can make it raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is no checkpoint that can be read safely: {reason}") from None
    weights = whole
    for name in _NESTED:
        if isinstance(whole, Mapping) and isinstance(whole.get(name), Mapping):
            weights = whole[name]
            break
    if not isinstance(weights, Mapping) or not weights or not all(map(_is_entry, weights.items())):
        found = ", ".join(map(repr, list(whole)[:6])) if isinstance(whole, Mapping) else type(whole).__name__
        raise ValueError(f"{path} holds no state dict, alone or as 'model' or 'state_dict', but {found}")
    return dict(weights)


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)
