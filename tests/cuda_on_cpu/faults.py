"""Faults that the executor must catch: each a change to a copy of csrc/, and the call that shows it.

PYTHONPATH=tests python -m cuda_on_cpu.faults [word in the name ...]     (make faults runs all)
"""

# ruff: noqa: E501 (a fault is one line)
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.ops.angular_margin import ActivationPairs, angular_margin
from kdkernels.ops.energy import AttentionPairs, attention
from kdkernels.ops.gram import LayerPairs, SPOptions, cosine_similarity, sp_gram
from kdkernels.ops.softmax_kl import Labels, Rows, Terms, softmax_kl

from . import build, library


def _sp(batch: int, width: int, layers: int = 1) -> None:
    from checking import check_op

    student = [torch.rand(batch, width) for _ in range(layers)]
    teacher = [torch.rand(batch, width // 2) for _ in range(layers)]
    options = SPOptions([1.0] * layers, reduction="sum", layer_reduction="none")
    check_op(
        lambda *x: sp_gram(LayerPairs(list(x[:layers]), list(x[layers:]), options)),
        student,
        constants=teacher,
        upstream=1e3,
    )


def _cosine(dtype: torch.dtype) -> None:
    from checking import check_op

    check_op(cosine_similarity, [torch.randn(5, 300, dtype=dtype), torch.randn(3, 300, dtype=dtype)])


def _softmax(rows: int, classes: int, lam: Tensor) -> None:
    from checking import check_op

    a = torch.arange(rows)
    terms = Terms(ce=0.1, kl=0.3, target_kl=1.0, non_target_kl=8.0)
    student, teacher = (torch.randn(rows, classes) for _ in range(2))
    check_op(
        lambda s, t, lam: softmax_kl(Rows(s, t, Labels(a, a + 1, lam), terms, temperature=4.0)),
        [student],
        constants=[teacher, lam],
    )


def _angular(height: int, width: int, layers: int = 1, channels: int = 3) -> None:
    from checking import check_op

    student = [torch.rand(2, channels, height, width) for _ in range(layers)]
    teacher = [torch.rand(2, 5, height, width) for _ in range(layers)]
    options = {"layer_reduction": "none", "local_weight": 0.2}
    check_op(
        lambda *x: angular_margin(ActivationPairs(list(x[:layers]), list(x[layers:]), [1.0] * layers, **options)),
        student,
        constants=teacher,
    )


def _attention(channels: int = 3, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> None:
    from checking import check_op

    def view(x: Tensor) -> Tensor:
        if layout == "misaligned":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x

    check_op(
        lambda s, t: attention(AttentionPairs([view(s)], [view(t)], [1.0], absolute=True)),
        [torch.rand(2, channels, 5, 7, dtype=dtype)],
        constants=[torch.rand(2, 2 * channels, 5, 7, dtype=dtype)],
    )


PROBES: dict[str, Callable[[], None]] = {
    "sp": partial(_sp, 5, 300),
    "sp of two tiles": partial(_sp, 66, 20),
    "sp of two launches": partial(_sp, 2, 4, layers=17),
    "cosine": partial(_cosine, torch.float32),
    "cosine in fp64": partial(_cosine, torch.float64),
    "narrow rows": partial(_softmax, 5, 11, torch.full((5,), 0.3)),
    "wide rows": partial(_softmax, 2, 2100, torch.tensor(0.3)),
    "attention": _attention,
    "wide maps": partial(_attention, 16, dtype=torch.bfloat16),
    "misaligned": partial(_attention, 16, layout="misaligned"),
    "channels_last": partial(_attention, 72, layout="channels_last"),
    "angular": partial(_angular, 5, 7),
    "large maps": partial(_angular, 50, 45, channels=1),
    "larger maps": partial(_angular, 66, 65, channels=1),
    "channels in chunks": partial(_angular, 20, 20, channels=64),
    "angular of two launches": partial(_angular, 2, 2, layers=17),
}


class Fault(NamedTuple):
    name: str
    file: str
    old: str  # once in the file
    new: str
    probe: str


_LOADED = "    __syncthreads();\n#pragma unroll\n    for (int d = 0; d < kDepth; ++d) {\n      T a[4], b[4];"
_COSINE_BYTES = "workspace(const CosineForward& x) {\n  return "
FAULTS = [
    Fault("no barrier behind the loads", "products.cuh", _LOADED, _LOADED.replace("__syncthreads();", ""), "sp"),
    Fault("no barrier before the next loads", "products.cuh", "+= a[r] * b[c];\n    }\n    __syncthreads();", "+= a[r] * b[c];\n    }", "sp"),
    Fault("shared index + 1", "products.cuh", "= tile_a[d][y + 16 * r];", "= tile_a[d][y + 16 * r + 1];", "sp"),
    Fault("row mask dropped", "products.cuh", "row < q.count && column < end ?", "column < end ?", "sp"),
    Fault("column mask dropped", "products.cuh", "row < q.count && column < end ?", "row < q.count ?", "cosine"),
    Fault("output mask dropped", "products.cuh", "< p.a.count && column + x + 16 * c < p.b.count)", "< p.a.count)", "sp"),
    Fault("gradient mask dropped", "products.cuh", "if (to >= p.own.width) continue;", "", "sp"),
    Fault("strides swapped", "products.cuh", "at * p.row_stride + (k + x) * p.column_stride", "at * p.column_stride + (k + x) * p.row_stride", "cosine"),
    Fault("accumulator without a start", "products.cuh", "T sum[4][4] = {};\n  for (int64_t k = begin", "T sum[4][4];\n  for (int64_t k = begin", "sp"),
    Fault("all splits write one product", "products.cuh", "p.partial + split * p.a.count * p.b.count", "p.partial", "sp"),
    Fault("two blocks write one sum", "cosine.cuh", "inner[blockIdx.x] = sum", "inner[blockIdx.x / 2] = sum", "cosine"),
    Fault("product mask dropped", "cosine.cuh", "if (at >= n * m) return;", "", "cosine"),
    Fault("the upper half is read", "gram.cu", "j <= i ? i * n + j : j * n + i", "i * n + j", "sp of two tiles"),
    Fault("weights mask dropped", "gram.cu", "if (at >= total) return;", "", "sp"),
    Fault("no room for the losses", "gram.cu", "return 8 * x.layers * x.batch + x.layers", "return x.layers", "sp"),
    Fault("no room for the matrices", "gram.cu", "(layout.matrices * layout.size + layout.numbers())", "layout.numbers()", "sp"),
    Fault("every launch has the first layers", "gram.cu", "layer = c.first_layer + blockIdx.x / n", "layer = blockIdx.x / n", "sp of two launches"),
    Fault("no room for the splits", "gram.cu", f"{_COSINE_BYTES}int64_t(product_splits(x.a, x.b)) * ", _COSINE_BYTES, "cosine in fp64"),
    Fault("cosines without a workspace", "cuda.h", "int64_t workspace(const CosineForward&);\n", "", "cosine"),
    Fault("no workspace at all", "dispatch.h", "call.workspace = scratch.mutable_data_ptr();", "", "sp"),
    Fault("no barrier before shared is used again", "device.cuh", "  __syncthreads();  // whoever used `shared` before is done\n", "", "wide rows"),
    Fault("no barrier behind the warps' sums", "device.cuh", "shared[warp] = x;\n  __syncthreads();", "shared[warp] = x;", "sp"),
    Fault("wrong lane", "device.cuh", "x, offset, width)", "x, offset / 2, width)", "narrow rows"),
    Fault("half a warp in the mask", "device.cuh", "__shfl_xor_sync(0xffffffffu", "__shfl_xor_sync(0x0000ffffu", "narrow rows"),
    Fault("row bound dropped", "softmax_kl.cu", "if (team.row >= x.rows) return;\n  const double loss", "const double loss", "narrow rows"),
    Fault("statistics overwritten", "softmax_kl_row.h", "to[2 * x.rows] = static_cast<T>(r.log_p)", "to[x.rows] = static_cast<T>(r.log_p)", "narrow rows"),
    Fault("workspace a row short", "softmax_kl.cu", "return 8 * x.rows;", "return 8 * (x.rows - 1);", "narrow rows"),
    Fault("every thread writes the loss", "softmax_kl.cu", "  if (threadIdx.x) return;\n", "", "narrow rows"),
    Fault("one lam read as one per row", "bindings_softmax_kl.h", "lam.dim() ? lam.stride(0) : 0", "1", "wide rows"),
    Fault("no barrier behind the slices", "energy.cu", "= sum[j];\n  __syncthreads();", "= sum[j];", "angular"),
    Fault("a slice too many", "energy.cu", "k < rows * count;", "k < (rows + 1) * count;", "angular"),
    Fault("no repeats", "energy.cu", "repeats = v.tiles == 1 ? v.repeats : 1;", "repeats = 1;", "wide maps"),
    Fault("the first chunk for all", "energy_views.cuh", "const int row = p.chunk * v.chunk + slice,", "const int row = slice,", "channels in chunks"),
    Fault("chunks overlap", "energy_views.cuh", "min(v.rows, (p.chunk + 1) * v.chunk)", "v.rows", "channels in chunks"),
    Fault("a chunk too few", "energy_maps.cuh", "k < parts; ++k)", "k < parts - 1; ++k)", "channels in chunks"),
    Fault("16 bytes of any address", "energy_views.cuh", "v.wide = aligned(a.data) && aligned(out) &&", "v.wide =", "misaligned"),
    Fault("16 bytes of any width", "energy_views.cuh", " && run % per_16 == 0;", ";", "angular"),
    Fault("loads beyond the column", "vectors.cuh", "if (i + k < count) ahead[k]", "ahead[k]", "wide maps"),
    Fault("tiles without a pixel's place", "energy_views.cuh", "first = p.tile * v.tile;", "first = 0;", "channels in chunks"),
    Fault("lanes beyond the channels", "energy_views.cuh", "count - 1) / count : 0);", "count) / count : 0);", "channels_last"),
    Fault("half of the lanes' sums", "energy.cu", "reduce_lanes(sum, lanes.count, Add())", "reduce_lanes(sum, lanes.count / 2, Add())", "channels_last"),
    Fault("no room for the parts", "energy_maps.cuh", "(plan.sums() + (on_chip", "((on_chip", "angular"),
    Fault("no room for large maps", "energy_maps.cuh", "on_chip ? 0 : maps * plan.pixels()", "0", "larger maps"),
    Fault("too little shared memory", "energy_maps.cuh", "int64_t bytes = maps * plan.largest()", "int64_t bytes = (maps - 1) * plan.largest()", "angular"),
    Fault("shared memory that was not asked for", "energy_maps.cuh", "if (bytes > (48 << 10))", "if (bytes > (1 << 20))", "large maps"),
    Fault("nobody sets the arrivals to 0", "energy.cu", "*arrived = 0;", ";", "angular"),
    Fault("losses read before they are there", "energy_maps.cuh", "    __threadfence();\n    const unsigned highest", "    const unsigned highest", "angular"),
    Fault("the first block sums", "energy_maps.cuh", "highest) == highest;", "highest) == 0;", "angular"),
    Fault("the gradient into the input", "energy.cu", "P* to = static_cast<P*>(part.layer.out) + at.begin;", "P* to = static_cast<P*>(const_cast<void*>(part.view().data)) + at.begin;", "angular"),
    Fault("a vector's pixels do not wrap", "energy.cu", "pixel = pixel + 1 < pixels ? pixel + 1 : 0;", "++pixel;", "wide maps"),
    Fault("all layers' maps in one place", "bindings_energy.h", "layer.offset = pixels;", "layer.offset = 0;", "angular of two launches"),
    Fault("no barrier before sums are read", "angular_maps.cuh", "[k] = sum;\n    }\n    __syncthreads();", "[k] = sum;\n    }", "angular"),
    Fault("no barrier behind the lengths", "angular_maps.cuh", "Divisor<T>(static_cast<T>(unit_length(norm_t_)));\n    }\n    __syncthreads();", "Divisor<T>(static_cast<T>(unit_length(norm_t_)));\n    }", "angular"),
    Fault("half of the block at the barriers", "angular_maps.cuh", "    tell(gaps);", "    if (threadIdx.x < 64) tell(gaps);", "angular"),
    Fault("a quadrant's neighbour", "angular_maps.cuh", "quadrant_(local_ ? 1 + threadIdx.x / 32 % 4 : 0)", "quadrant_(local_ ? 1 + threadIdx.x / 64 % 4 : 0)", "angular"),
    Fault("rows of a region run on", "angular_maps.cuh", "n += next_row_;", ";", "large maps"),
    Fault("a sign dropped", "energy.cu", "inner += sign(d) * u;", "inner += u;", "attention"),
    Fault("unit maps of another sample", "energy_maps.cuh", "offset(layer.offset + int64_t(sample) * pixels)", "offset(layer.offset)", "attention"),
    Fault("energies without a teacher", "energy_views.cuh", "if (both_) made.views[1] =", "if (false) made.views[1] =", "attention"),
]  # fmt: skip


def patched(fault: Fault) -> dict[str, str]:
    files = build.csrc()
    found = files[fault.file].count(fault.old)
    if found != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} is {found} times in {fault.file}, not once")
    files[fault.file] = files[fault.file].replace(fault.old, fault.new)
    return files


def verdict(files: dict[str, str], probe: str) -> str:
    """What a probe of the checked build says, or "" if nothing is wrong. In a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        message = ""
        try:
            library.install("checked", files)
            for _ in range(3):  # forwards and backwards through the threads
                torch.manual_seed(0)
                PROBES[probe]()
        except Exception as error:
            message = str(error).strip().splitlines()[0]
        os.write(writer, message.encode()[:1000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    return message or (f"died of signal {status}" if status else "")


def main(words: list[str]) -> int:
    from kdkernels import use_backend

    chosen = [f for f in FAULTS if not words or any(word in f.name for word in words)]
    build.library("checked")  # what all of them share
    with ThreadPoolExecutor(build.WORKERS) as pool:
        list(pool.map(lambda f: build.library("checked", patched(f)), chosen))
    missed = 0
    with use_backend("native"):
        for probe in sorted({fault.probe for fault in chosen}):
            message = verdict(build.csrc(), probe)
            if message:
                raise RuntimeError(f"{probe} fails without any fault: {message}")
        for fault in chosen:
            message = verdict(patched(fault), fault.probe)
            missed += not message
            print(f"{'caught' if message else 'MISSED'}  {fault.name}: {message}", flush=True)
    return missed


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
