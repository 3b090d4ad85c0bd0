"""``kdkernels doctor``: what is available here, what each op runs on, and why not on the others."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator

import torch

from . import __version__
from .ops import backend

TRAIN_PACKAGES = ("accelerate", "safetensors", "sklearn", "rich", "matplotlib", "yaml")
# GPU kernels whose cost is known: from a GPU's clock, or from their machine code (python -m benchmarks.counted)
MEASURED: dict[str, tuple[str, ...]] = {"native": (), "triton": ()}
COUNTED = dict.fromkeys(MEASURED, ("softmax_kl", "gram", "energy", "angular_margin"))
VARIABLES = (
    backend.VARIABLE,
    "KDKERNELS_JIT",
    "KDKERNELS_ISA",
    "KDKERNELS_CUDA_ARCHITECTURES",
    "XDG_CACHE_HOME",
    "TRITON_INTERPRET",
)


def version_of(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        devices.append(torch.device("xpu"))
    return devices


def report() -> Iterator[str]:
    """The lines that ``kdkernels doctor`` prints."""
    yield f"kdkernels {__version__}, Python {platform.python_version()}, {platform.platform()}"
    packages = ", ".join(f"{name} {version_of(name) or 'not installed'}" for name in ("triton", "numpy"))
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, {packages}"
    for device in _devices():
        what = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        yield f"device {device.type}: {what}"
    for variable in VARIABLES:
        yield f"{variable}={os.environ.get(variable, '')}"
    missing = [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]
    yield "extra train: " + (f"missing {', '.join(missing)}" if missing else "installed")
    yield f"requested backend: {backend.requested()}"
    yield "\nGPU kernels' speed:"
    for op in backend.OPS:
        for name in MEASURED:
            known = (
                "measured" if op in MEASURED[name] else "counted, not measured" if op in COUNTED[name] else "neither"
            )
            yield f"  {op:14s} {name:7s} {known}"
    for device in _devices():
        yield f"\non {device.type}:"
        for op in (*backend.OPS, *backend.CPU_OPS):
            yield f"  {op}"
            yield from _op(op, device)


def _op(op: str, device: torch.device) -> Iterator[str]:
    probe = torch.ones(2, 2, device=device)
    chosen: object = None
    try:
        chosen = backend.choose(op, probe)
    except backend.BackendError as error:
        yield f"    cannot run: {error}"
    for name in backend.MODULES:
        reason = backend.why_not(op, name, probe)
        mark = "->" if chosen is not None and chosen is backend.load(op, name) else "  "
        yield f"    {mark} {name:10s} {'available' if reason is None else reason}"
