"""What a folder of runs says of itself: config.yaml, which --config takes again, and versions.json."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import __version__
from ..doctor import version_of
from . import runs

CONFIG, VERSIONS = "config.yaml", "versions.json"
NOT_KEPT = ("command", "line", "run", "config", "output", "overwrite", "resume")  # what is done, and where to
PACKAGES = ("torch", "accelerate", "safetensors", "numpy", "triton", "datasets", "timm", "torchvision", "transformers")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options as YAML can hold them."""
    kept = {name: value for name, value in vars(args).items() if name not in NOT_KEPT}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def versions(args: argparse.Namespace) -> dict[str, str]:
    found = {"kdkernels": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found |= {package: version for package in PACKAGES if (version := version_of(package)) is not None}
    device = torch.accelerator.current_accelerator()
    found["device"] = "cpu" if device is None else torch.get_device_module(device).get_device_name()
    found["threads"] = str(torch.get_num_threads())
    found["command"] = args.line
    return found


def write(folder: Path, args: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(settings(args), sort_keys=False)
    runs.write_whole(folder / CONFIG, lambda path: path.write_text(text))
    write_json(folder / VERSIONS, versions(args))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    runs.write_whole(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def read(folder: Path) -> dict[str, Any]:
    """The options that were kept in a folder; none where there is no whole file of them."""
    path = folder / CONFIG
    try:
        found = yaml.safe_load(path.read_text()) if path.is_file() else {}
    except yaml.YAMLError:
        found = {}
    return found if isinstance(found, dict) else {}
