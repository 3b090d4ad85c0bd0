"""The native backend: finds the library of csrc/ in the package, or builds it once into the user's cache, and loads it.

    KDKERNELS_JIT=0         never build at run time
    KDKERNELS_ISA=...       base, avx2 or avx512 instead of the best that the machine has
    KDKERNELS_CUDA_ARCHITECTURES=80,90      the GPUs that a build is for
    XDG_CACHE_HOME          where the cache is, default ~/.cache

Nothing is built when kdkernels is imported; the first use of an op builds. Whatever goes wrong becomes the reason why
the native backend is not available.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import native_build
from .checks import FLOATING
from .native_build import BuildError

PACKAGE = Path(__file__).parents[1]
INSTALLED = PACKAGE / "_native.abi3.so"
FORBIDDEN = ("0", "false", "off", "no")  # values of KDKERNELS_JIT
# what cudaFuncGetAttributes says of a kernel that cannot run
CUDA_ERRORS = {
    35: "its driver is older than the CUDA toolkit that they were built with",
    209: "they are built for compute capability 8.0 and up",
    222: "its driver is too old to compile their PTX",
}
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
                asked = os.environ.get("KDKERNELS_JIT", "1").lower() in FORBIDDEN
                logger.log(
                    logging.INFO if asked else logging.WARNING,  # several times slower, and nobody asked for it
                    "the native kernels are not available, slower ones take their place: %s",
                    _state["reason"],
                )
        return _state["reason"]


def _find_and_load() -> str | None:
    reason = "it was not built when the package was installed"
    if INSTALLED.exists():
        try:
            native_build.host_isa()  # the library would take a wrong name for none
            _load(INSTALLED)
            return None
        except BuildError as error:
            reason = str(error)
            logger.warning("%s; building it anew", reason)
    if os.environ.get("KDKERNELS_JIT", "1").lower() in FORBIDDEN:
        return f"{reason}, and KDKERNELS_JIT=0 forbids to build it now"
    if torch.version.cuda is not None and torch.cuda.is_available():
        try:
            _build_and_load(cuda=True)
            return None
        except BuildError as error:
            logger.warning("building the CUDA kernels failed (%s); building those for the CPU alone", error)
    try:
        _build_and_load(cuda=False)
        return None
    except BuildError as error:
        return f"{reason}, and it cannot be built now: {error}"


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        first = str(error.__cause__ or error).partition("\n")[0]  # torch's own words name no reason
        raise BuildError(f"{library} cannot be loaded ({first})") from error


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdkernels"


def _private(folder: Path) -> Path:
    """The folder, created for this user alone. A library in a folder that others can write to is not loaded."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise BuildError(f"the cache {folder} belongs to another user: set XDG_CACHE_HOME to a folder of yours")
    if status.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _build_and_load(cuda: bool) -> None:
    from filelock import FileLock, Timeout

    plan = native_build.plan(PACKAGE, isas=[native_build.host_isa()], cuda=cuda)
    cache = cache_folder()
    try:
        folder = _private(_private(cache) / plan.key())
        library = folder / f"{plan.fingerprint()}.so"
        with FileLock(folder / "lock", timeout=LOCK_TIMEOUT):  # of several processes one builds and the others wait
            if library.exists():
                with suppress(BuildError):
                    _load(library)
                    return
                shutil.rmtree(folder / "build", ignore_errors=True)  # made beside other libraries: all of it anew
            kind = "CPU and CUDA" if plan.cuda else "CPU"
            logger.warning("building the native %s kernels into %s, once (KDKERNELS_JIT=0 forbids it)", kind, folder)
            native_build.build(plan, folder / "build", library)
            _load(library)
    except Timeout as error:
        raise BuildError(f"another process has held {error.lock_file} for {LOCK_TIMEOUT:.0f} s") from error
    except OSError as error:
        reason = f"the cache {cache} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder that can"
        raise BuildError(reason) from error


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
        if x.device.type == "cuda" and (reason := _cuda_reason(x.device)):
            return reason
    return None


@cache
def _cuda_reason(device: torch.device) -> str | None:
    """None if the library's CUDA kernels can run on this device, else the reason. Its driver is asked once."""
    if not hasattr(torch.ops.kdkernels_native, "cuda_status"):
        return "the native library has no CUDA kernels: it was built without nvcc, or where no GPU was at hand"
    status = torch.ops.kdkernels_native.cuda_status(device.index)
    if status == 0:
        return None
    name = CUDA_ERRORS.get(status, f"CUDA error {status}")
    return f"the native CUDA kernels cannot run on {device}: {name}{_capability(device)}"


def _capability(device: torch.device) -> str:
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError):
        return ""
    return f" (its compute capability is {major}.{minor})"


def supports_cpu(*tensors: Tensor) -> str | None:
    """The same for an op whose kernels are for the CPU alone."""
    for x in tensors:
        if not x.is_cpu:
            return f"the op has native kernels for the CPU alone, not for {x.device.type}"
    return supports(*tensors)
