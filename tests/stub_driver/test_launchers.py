"""What Triton's launchers hand to the driver: neither its interpreter nor its compiler sees tuples of layers packed."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels

from . import Launch, active, launches, why_not


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, *shape).to(dtype)
    return student.requires_grad_(), teacher


def logits() -> Tensor:
    student, teacher = pair(64, 100)
    labels = torch.randint(100, (2, 64))
    return kdkernels.stkd_loss(student, teacher, labels[0], labels[1], torch.tensor(0.3))


def wide_logits() -> Tensor:
    return kdkernels.kd_loss(*pair(16, 40000, dtype=torch.bfloat16))


def cosines() -> Tensor:
    return kdkernels.cosine_similarity(*pair(24, 129)).sum()


def of_layers(loss: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    def call() -> Tensor:
        pairs = [pair(8, 16, 6, 5, dtype=dtype), pair(8, 1, 4, 4, dtype=dtype), pair(8, 24, 3, 3, dtype=dtype)]
        student, teacher = zip(*pairs, strict=True)
        teacher = (*teacher[:2], teacher[2].to(memory_format=torch.channels_last))
        return loss(list(student), list(teacher))

    return call


FAMILIES: dict[str, Callable[[], Tensor]] = {
    "softmax_kl": logits,
    "softmax_kl in chunks": wide_logits,
    "sp": of_layers(kdkernels.sp_loss, torch.float32),
    "sp bf16": of_layers(kdkernels.sp_loss, torch.bfloat16),
    "cosine": cosines,
    "energy": of_layers(kdkernels.at_loss, torch.float16),
    "angular_margin": of_layers(kdkernels.amd_loss, torch.float32),
}


def scalars(value: Any) -> Iterator[int | float | Tensor]:
    """What of an argument reaches the kernel: 1 and None are compiled in."""
    if isinstance(value, tuple | list):
        for x in value:
            yield from scalars(x)
    elif value is not None and not (isinstance(value, int) and value == 1):
        yield value


def check(launch: Launch, kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    assert launch.kernel == kernel.__name__
    assert launch.grid == (programs, 1, 1)
    assert launch.block == (32 * options.get("num_warps", 4), 1, 1)
    assert launch.shared <= 227 << 10
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    at_run_time = [given.get(p.name, p.default) for p in kernel.params if not p.is_constexpr]
    expected = list(scalars(tuple(at_run_time)))
    packed = list(launch.arguments.values())
    assert len(packed) == len(expected) + 2  # and two pointers to scratch memory that no kernel of ours asks for
    assert packed[-2:] == [bytes(8)] * 2
    end = 0
    for (offset, data), value in zip(launch.arguments.items(), expected, strict=False):
        assert offset == -(-end // len(data)) * len(data)  # one behind the other, each at its alignment
        end = offset + len(data)
        if isinstance(value, Tensor):
            assert len(data) == 8
            assert int.from_bytes(data, "little") == value.data_ptr()
        elif isinstance(value, float):
            assert data == struct.pack("<f", value)
        else:
            assert len(data) == (4 if -(2**31) <= value < 2**31 else 8)
            assert int.from_bytes(data, "little", signed=True) == value


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_arrive(family: str) -> None:
    from benchmarks.launched import launching

    asked: list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]] = []

    def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
        if programs:
            kernel[(programs,)](*args, **options)
            asked.append((kernel, programs, args, options))

    with active(), launching(launch), kdkernels.use_backend("triton"):
        launches()
        FAMILIES[family]().backward()
        found = launches()
    assert len(found) == len(asked) >= 2
    for got, wanted in zip(found, asked, strict=True):
        check(got, *wanted)
