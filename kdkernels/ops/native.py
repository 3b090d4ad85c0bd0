"""The native backend: finds the library of csrc/ in the package, or builds it once into the user's cache, and loads it.

    KDKERNELS_JIT=0         never build at run time
    KDKERNELS_ISA=...       build for base, avx2 or avx512 instead of what the machine has
    XDG_CACHE_HOME          where the cache is, default ~/.cache

Nothing is built when kdkernels is imported; the first use of an op builds. Whatever goes wrong becomes the reason why
the native backend is not available.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from . import native_build
from .checks import FLOATING
from .native_build import BuildError

PACKAGE = Path(__file__).parents[1]
INSTALLED = PACKAGE / "_native.abi3.so"
LOCK_TIMEOUT = 300.0  # seconds to wait for another process that builds

logger = logging.getLogger("kdkernels")
_lock = threading.Lock()
_state: dict[str, str | None] = {}  # "reason": None once the library is loaded, else why not


def why_not() -> str | None:
    """None with the library loaded, else the reason why it cannot be. Tried once per process."""
    with _lock:
        if "reason" not in _state:
            try:
                _state["reason"] = _find_and_load()
            except Exception as error:  # whatever is wrong with the machine must not stop a training run
                _state["reason"] = f"{type(error).__name__}: {error}"
            if _state["reason"]:
                logger.info("the native kernels are not available: %s", _state["reason"])
        return _state["reason"]


def _find_and_load() -> str | None:
    reason = "it was not built when the package was installed"
    if INSTALLED.exists():
        try:
            torch.ops.load_library(str(INSTALLED))
            return None
        except (OSError, RuntimeError) as error:
            reason = f"{INSTALLED} cannot be loaded ({_one_line(error)})"
            logger.warning("%s; building it anew", reason)
    if os.environ.get("KDKERNELS_JIT", "1").lower() in ("0", "false", "off", "no"):
        return f"{reason}, and KDKERNELS_JIT=0 forbids to build it now"
    if torch.version.cuda is not None and torch.cuda.is_available():
        try:
            return _build_and_load(cuda=True)
        except BuildError as error:
            logger.warning("building the CUDA kernels failed (%s); building those for the CPU alone", error)
    try:
        return _build_and_load(cuda=False)
    except BuildError as error:
        return f"{reason}, and it cannot be built now: {error}"


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdkernels"


def _private(folder: Path) -> Path:
    """The folder, created for this user alone. A library in a folder that others can write to is not loaded."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid():
            raise BuildError(f"the cache {folder} belongs to another user: set XDG_CACHE_HOME to a folder of yours")
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise BuildError(
            f"the cache {folder} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder that can"
        ) from error
    return folder


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``; of several processes one builds and the others wait."""
    try:
        import fcntl
    except ImportError as error:
        raise BuildError("building needs a POSIX system") from error
    try:
        file = path.open("w")
    except OSError as error:
        raise BuildError(f"the cache {path.parent} cannot be written ({error.strerror}): set XDG_CACHE_HOME") from error
    with file:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has held {path} for {LOCK_TIMEOUT:.0f} s") from error
                time.sleep(0.05)
        yield


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_whole(library: Path) -> bool:
    """Loading a truncated library can kill the process, so its contents are compared with their checksum first."""
    try:
        return library.with_suffix(".sha256").read_text() == _digest(library)
    except (OSError, UnicodeDecodeError):
        return False


def _build_and_load(cuda: bool) -> str | None:
    plan = native_build.plan(PACKAGE, isas=[native_build.host_isa()], cuda=cuda)
    folder = _private(_private(cache_folder()) / plan.fingerprint())
    library = folder / "native.so"
    with _only_one(folder / "lock"):
        for attempt in range(2):
            if not _is_whole(library):
                _build(plan, library)
            try:
                torch.ops.load_library(str(library))
                return None
            except (OSError, RuntimeError) as error:
                if attempt:
                    raise BuildError(f"{library} cannot be loaded: {_one_line(error)}") from error
                library.unlink(missing_ok=True)  # built on another machine, or against another library: once more
    return None


def _build(plan: native_build.Plan, library: Path) -> None:
    kind = "CPU and CUDA" if plan.cuda else "CPU"
    logger.warning("building the native %s kernels into %s, once (KDKERNELS_JIT=0 forbids it)", kind, library.parent)
    start = time.monotonic()
    try:
        native_build.build(plan, library)
        library.with_suffix(".sha256").write_text(_digest(library))
    except OSError as error:
        raise BuildError(f"the cache {library.parent} cannot be written: {error}") from error
    logger.info("built in %.0f s", time.monotonic() - start)


def supports(*tensors: Tensor) -> str | None:
    """None if the library's kernels, the same for all ops, can compute these tensors, else the reason why not."""
    reason = _state["reason"] if "reason" in _state else why_not()
    if reason is not None:
        return reason
    for x in tensors:
        if x.is_cpu and x.dtype in FLOATING:
            continue
        if x.device.type not in ("cpu", "cuda"):
            return f"there are no native kernels for {x.device.type}"
        if x.dtype not in FLOATING:
            return f"there are no native kernels for {x.dtype}"
        if x.device.type == "cuda" and not hasattr(torch.ops.kdkernels_native, "has_cuda"):
            return "the native library has no CUDA kernels: it was built without nvcc, or where no GPU was at hand"
    return None
