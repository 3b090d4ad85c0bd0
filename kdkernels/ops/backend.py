"""Which implementation of an op runs, and why.

Every op's folder has up to three modules with the same functions, those of the Protocol in its op.py:
``supports(*tensors)``, which returns None or the reason why not, and the op's forward and backward passes. They save
the same things, so a forward pass of one may be followed by the backward pass of another.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor

OPS = ("softmax_kl", "gram", "energy", "angular_margin")
# native kernels for the CPU; the reference elsewhere
CPU_OPS = ("relation", "channel_gram", "neighbour_correlation", "nkd", "softmax_pearson", "multi_level")
MODULES = {"native": "native", "triton": "triton_kernels", "reference": "reference"}  # each backend's in an op's folder
VARIABLE = "KDKERNELS_BACKEND"
# auto tries these in turn, fastest first; a device that is not listed has the reference alone. CUDA's order follows
# from the table in docs/backends.md.
AUTO_ORDER = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference"), "xpu": ("triton", "reference")}

logger = logging.getLogger("kdkernels")
_choices: dict[object, tuple[int, str]] = {}  # those of use_backend in force: which thread chose what, innermost last


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot do what was asked of it."""


def _check(name: str, source: str) -> str:
    if name not in ("auto", *MODULES):
        raise ValueError(f"{source} must be one of 'auto', {', '.join(map(repr, MODULES))}, got {name!r}")
    return name


def requested() -> str:
    """The backend in force: that of the innermost ``use_backend``, else KDKERNELS_BACKEND, else "auto".

    A thread that has chosen nothing, as autograd's own have not, follows those that have.
    """
    if _choices:
        innermost = dict(list(_choices.values()))
        own = innermost.get(threading.get_ident())
        if own is not None:
            return own
        if innermost:  # the last of the others may just have left
            return _of_others(innermost)
    name = os.environ.get(VARIABLE)
    return _check(name, VARIABLE) if name else "auto"


def _of_others(innermost: dict[int, str]) -> str:
    names = sorted(set(innermost.values()))
    if len(names) > 1:
        raise BackendError(
            f"this thread has chosen no backend, and other threads have chosen {' and '.join(map(repr, names))}: "
            "let it call use_backend itself"
        )
    return names[0]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on one backend: ``with kdkernels.use_backend("reference"): ...``.

    ``name`` is "native", "triton", "reference" or "auto". The choice holds for the calling thread, and for threads
    that choose nothing themselves, such as autograd's own, which run backward passes on GPUs; while two threads have
    chosen differently, such a thread raises ``BackendError``. An op that the backend cannot run raises ``BackendError``
    with the reason; a name that does not exist raises ValueError.
    """
    this = object()
    _choices[this] = threading.get_ident(), _check(name, "use_backend(name)")
    try:
        yield
    finally:
        del _choices[this]


@cache
def load(op: str, backend: str) -> Any:
    """The module that implements ``op`` on ``backend``, or a string that says why there is none."""
    name = f"kdkernels.ops.{op}.{MODULES[backend]}"
    if importlib.util.find_spec(name) is None:
        return f"this version of kdkernels has no {backend} implementation of {op}"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported: {error}"


def why_not(op: str, backend: str, *tensors: Tensor) -> str | None:
    """None if ``backend`` can run ``op`` on these tensors, else the reason."""
    implementation = load(op, backend)
    reason: str | None = implementation if isinstance(implementation, str) else implementation.supports(*tensors)
    return reason


@cache
def _log_fallback(op: str, device: str, backend: str, reasons: tuple[str, ...]) -> None:
    # on an accelerator a fallback is a slow step that nobody asked for; on a CPU it is business as usual
    level = logging.INFO if device == "cpu" else logging.WARNING
    logger.log(level, "%s on %s runs on the %s backend: %s", op, device, backend, "; ".join(reasons))


def choose(op: str, *tensors: Tensor) -> Any:
    """The implementation of ``op`` for these tensors, by the request in force."""
    name = requested()
    device = tensors[0].device.type
    reasons: list[str] = []
    for candidate in AUTO_ORDER.get(device, ("reference",)) if name == "auto" else (name,):
        implementation = load(op, candidate)
        reason = implementation if isinstance(implementation, str) else implementation.supports(*tensors)
        if reason is None:
            if reasons:
                _log_fallback(op, device, candidate, tuple(reasons))
            return implementation
        reasons.append(f"{candidate}: {reason}")
    if name != "auto":
        raise BackendError(f"backend {name!r} was asked for by name and cannot run {op}: {reason}")
    raise BackendError(f"no backend can run {op} on {device}: {'; '.join(reasons)}")
