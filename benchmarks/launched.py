"""The GPU launches of a case, without a GPU: native ones from the executor of tests/cuda_on_cpu, Triton's from its
interpreter. A few blocks of each launch run, at the case's own shapes, and stand for all of them; no result is right.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import Case, Provider
from .instructions import Place

ROOT = Path(__file__).parents[1]
BLOCKS = 8  # of each launch, evenly spread


class Last(NamedTuple):
    """What the last of several blocks does when all have arrived: on one multiprocessor."""

    requested: float
    bytes_at: dict[Place, float]


class Work(NamedTuple):
    """One launch. Bytes of global memory: of the tensors touched; of each block's sectors once; of all it asks for."""

    elements: int  # of the student in this case
    kernel: str
    blocks: int
    threads: int  # of a block; 0: as compiled
    dynamic_shared: int
    distinct: int
    once: float
    requested: float
    bank_conflicts: float
    bytes_at: dict[Place, float]  # by source line, shared memory included where it is known
    requests: float = 0.0  # of warps, to global memory
    shared_requests: float = 0.0
    last: Last | None = None


def step(case: Case, backend: str) -> int:
    """The student's elements."""
    inputs = case.inputs()
    Provider(case.ours, case.gradient, backend).step(inputs)
    return sum(x.numel() for x in inputs[0])


def native(cases: list[Case]) -> list[list[Work]]:
    sys.path.insert(0, str(ROOT / "tests"))
    from cuda_on_cpu import library

    executor = library.install("checked")
    executor.cuda_on_cpu_sample(BLOCKS)
    executor.cuda_on_cpu_count(1)
    found = []
    for case in cases:
        library.launches(executor)
        elements = step(case, "native")
        found.append([_of_executor(x, elements) for x in library.launches(executor)])
    return found


def _of_executor(x: Any, elements: int) -> Work:
    blocks, threads = x.grid[0] * x.grid[1] * x.grid[2], x.block[0] * x.block[1] * x.block[2]
    share = blocks / x.blocks_run
    return Work(
        elements,
        x.kernel_with_types,
        blocks,
        threads,
        x.dynamic_shared,
        x.distinct_read + x.distinct_written,
        32 * x.sectors_once * share,
        32 * x.sectors * share,
        x.bank_conflicts * share,
        {place: n * share for place, n in x.bytes.items()},
        x.global_requests * share,
        x.shared_requests * share,
        Last(32 * x.last_sectors, x.last_bytes) if x.last_bytes else None,
    )


# ---- Triton


@contextlib.contextmanager
def launching(launch: Callable[..., None]) -> Iterator[None]:
    """Triton's host code as for a GPU of 132 multiprocessors, each launch handed to ``launch``."""
    from kdkernels.ops import triton_common

    stand_ins = {
        "launch": launch,
        "processors": lambda device: 132,
        "device_reason": lambda *tensors: None,
        "split_precision": lambda x: "tf32x3",
        "matmul_precision": lambda *xs: "tf32x3" if any(x.dtype == torch.float32 for x in xs) else "ieee",
    }
    originals = {name: getattr(triton_common, name) for name in stand_ins}
    import kdkernels.ops.angular_margin.triton_kernels
    import kdkernels.ops.energy.triton_kernels
    import kdkernels.ops.gram.triton_kernels
    import kdkernels.ops.softmax_kl.triton_kernels  # noqa: F401

    changed = []
    for module in [m for n, m in sys.modules.items() if n.startswith("kdkernels.ops")]:
        for name, original in originals.items():
            if vars(module).get(name) is original:
                setattr(module, name, stand_ins[name])
                changed.append((module, name, original))
    try:
        yield
    finally:
        for module, name, original in changed:
            setattr(module, name, original)


def interpreted(cases: list[Case]) -> list[list[Work]]:
    """Under TRITON_INTERPRET=1, which must be set when Triton is imported."""
    import numpy as np
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    grid_dim, grid_idx = builder.set_grid_dim, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store
    touched: dict[Place, float] = {}
    of_block: set[int] = set()
    sectors, once, pointers = [0], [0], [np.zeros(0, np.int64)]

    def note(ptrs: Any, mask: Any) -> None:
        size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        active = np.broadcast_to(ptrs.data, np.broadcast(ptrs.data, mask.data).shape)[mask.data.astype(bool)]
        place = _place()
        touched[place] = touched.get(place, 0) + size * active.size
        asked = np.unique(active // 32)
        sectors[0] += asked.size
        of_block.update(asked.tolist())
        if active.size:
            pointers.append(np.array([active.flat[0], active.flat[-1]]).astype(np.int64))

    def noted_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        note(ptrs, mask)
        return load(ptrs, mask, *rest)

    def noted_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(ptrs, mask)
        return store(ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = noted_load, noted_store
    interpreter.GridExecutor._restore_args_dev = lambda *a: None  # everything is on the CPU already
    found: list[list[Work]] = []

    def begin(program: int) -> None:
        once[0] += len(of_block)
        of_block.clear()
        grid_idx(program, 0, 0)

    def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
        if not programs:
            return
        touched.clear()
        sectors[0], once[0], pointers[1:] = 0, 0, []
        most = min(BLOCKS, programs)
        sample = [(2 * i + 1) * programs // (2 * most) for i in range(most)]
        builder.set_grid_dim = lambda *dims: grid_dim(programs, 1, 1)
        builder.set_grid_idx = lambda x, y, z: begin(sample[x])
        kernel[(len(sample),)](*args, **options)
        once[0] += len(of_block)
        of_block.clear()
        share, at = programs / len(sample), np.concatenate(pointers)
        spans = {(x.data_ptr(), x.numel() * x.itemsize) for x in _tensors((*args, *options.values()))}
        distinct = sum(n for begin, n in spans if np.any((at >= begin) & (at < begin + n)))
        places = {place: n * share for place, n in touched.items()}
        found[-1].append(
            Work(
                0, kernel.__name__, programs, 0, 0, distinct, 32 * once[0] * share, 32 * sectors[0] * share, 0.0, places
            )
        )

    with launching(launch):
        for case in cases:
            found.append([])
            elements = step(case, "triton")
            found[-1] = [work._replace(elements=elements) for work in found[-1]]
    return found


def _tensors(values: Any) -> Iterator[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple | list):
            yield from _tensors(x)


def _place() -> Place:
    """The lines of the kernels that are running, innermost first."""
    from triton.runtime.interpreter import GridExecutor

    frame, lines, last = sys._getframe(1), [], GridExecutor.__call__.__code__
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name.startswith("triton_") and "ops" in path.parts:
            lines.append(f"{path.name}:{frame.f_lineno}")
        elif frame.f_code is last:
            break
        frame = frame.f_back
    return tuple(lines)


if __name__ == "__main__":  # for benchmarks.counted, which cannot interpret and compile in one process
    from . import counted, launched  # by its name, which the pickle holds

    by_label = {case.label: case for case in counted.CASES}
    sys.stdout.buffer.write(pickle.dumps(launched.interpreted([by_label[label] for label in sys.argv[1:]])))
