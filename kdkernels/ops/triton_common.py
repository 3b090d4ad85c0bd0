"""What the Triton kernels of all ops share: device functions, and how a kernel is launched.

Layers travel as tuples of scalar arguments (pointers, strides, sizes), at most GROUP per launch: a table in device
memory would have to be copied there first, which breaks CUDA-graph capture and costs more than the launch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8  # activations per launch; each adds about eight scalar arguments
T = TypeVar("T")

# read when this module is imported, as @triton.jit reads it
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def pick(values, index):
    """values[index] of a tuple of scalars."""
    value = tl.where(index == 0, values[0], values[0])  # a number of the device, also where Triton knew it to be 1
    for i in tl.static_range(1, len(values)):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def find(starts, pid):
    """Which layer program pid works on: the last one that starts at or before it."""
    index = pid * 0
    for i in tl.static_range(1, len(starts)):
        index += (pid >= starts[i]).to(tl.int32)
    return index


@triton.jit
def aligned(x, ALIGN: tl.constexpr):
    """x, a multiple of ALIGN, so written that the compiler sees it: by itself it looks for 16, which 1000 is not.

    Not tl.multiple_of: that marks the value for the whole kernel, on branches where it does not hold too.
    """
    return x // ALIGN * ALIGN if ALIGN > 1 else x


@triton.jit
def store(pointers, x, mask):
    """Store fp32 x in the pointers' dtype, rounded to nearest even."""
    if INTERPRETED:  # noqa: SIM102
        if pointers.dtype.scalar.element_ty == tl.bfloat16:  # the interpreter truncates; a GPU rounds by itself
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, rounded, bits | 0x400000).to(tl.float32, bitcast=True)
    tl.store(pointers, x.to(pointers.dtype.scalar.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. Half inputs have exact products on tensor cores; the interpreter has no bf16 arithmetic."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def log1p(x):
    """log(1 + x): the rounding of 1 + x is divided out again."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


def device_reason(*tensors: Tensor) -> str | None:
    """None if Triton serves these tensors, else the reason."""
    if any(t.dtype == torch.float64 for t in tensors):
        return "float64 is for checking; the reference computes it"
    device = tensors[0].device
    if device.type == "cpu":
        if INTERPRETED.value:
            return None
        return "the tensors are on the CPU, which Triton serves only under TRITON_INTERPRET=1 (for tests)"
    if device.type == "cuda":
        if torch.version.hip is None and _capability(device) < (8, 0):
            return (
                f"Triton serves compute capability 8.0 and up, this GPU has {'.'.join(map(str, _capability(device)))}"
            )
        return None
    return None if device.type == "xpu" else f"Triton does not serve {device.type} tensors"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; few on a CPU, where every program is interpreted."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2 if device.type == "cpu" else 64


def matmul_precision(*tensors: Tensor) -> str:
    """For fp32 operands tf32 only where PyTorch's own setting allows it, else three products of it, which keep more
    digits than one fp32 sum over as many columns (tests/ops/test_split_products.py).
    """
    if any(t.dtype == torch.float32 for t in tensors):
        try:
            tf32 = torch.backends.cuda.matmul.allow_tf32
        except RuntimeError:  # the setting was made through the newer name, which the older one refuses to read
            tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        if tf32:
            return "tf32"
        return _three_products(tensors[0].device)
    return "ieee"  # exact on tensor cores


def split_precision(x: Tensor) -> str:
    """For fp32 times half: tf32 holds every half number, and three products of it hold the fp32 side's digits."""
    return matmul_precision(x) if x.dtype == torch.float32 else _three_products(x.device)


def _three_products(device: torch.device) -> str:
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Run ``kernel`` on the device of its tensors and that device's current stream."""
    if programs == 0:
        return
    guard: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if device.type == "cuda":
        guard = torch.cuda.device(device)
    elif device.type == "xpu":
        guard = torch.xpu.device(device)
    with guard:
        kernel[(programs,)](*args, **options)


def grouped(items: Sequence[T], key: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """The items of each key together, GROUP of them at a time: one launch each."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    for group in groups.values():
        for start in range(0, len(group), GROUP):
            yield group[start : start + GROUP]


def starts_of(counts: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Where each item's programs begin, and how many there are."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return tuple(starts[:-1]), starts[-1]


def alignment(*numbers: int) -> int:
    """The power of 2 that divides all of them, up to 8: 16 bytes of half numbers."""
    return math.gcd(8, *numbers)


def power_of_2(n: int, low: int, high: int) -> int:
    """The power of 2 that covers n, within [low, high]."""
    return max(low, min(high, triton.next_power_of_2(max(n, 1))))
