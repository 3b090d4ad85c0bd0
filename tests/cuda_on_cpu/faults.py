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


def _sp(batch: int, width: int, layers: int = 1, dtype: torch.dtype = torch.float32) -> None:
    from checking import check_op

    student = [torch.rand(batch, width).to(dtype) for _ in range(layers)]
    teacher = [torch.rand(batch, width // 2).to(dtype) for _ in range(layers)]
    options = SPOptions([1.0] * layers, reduction="sum", layer_reduction="none")
    check_op(
        lambda *x: sp_gram(LayerPairs(list(x[:layers]), list(x[layers:]), options)),
        student,
        constants=teacher,
        upstream=1e3,
    )


def _cosine(dtype: torch.dtype, width: int = 300) -> None:
    from checking import check_op

    check_op(cosine_similarity, [torch.randn(5, width, dtype=dtype), torch.randn(3, width, dtype=dtype)])


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


def _angular(height: int, width: int, layers: int = 1) -> None:
    from checking import check_op

    student = [torch.rand(2, 3, height, width) for _ in range(layers)]
    teacher = [torch.rand(2, 5, height, width) for _ in range(layers)]
    options = {"layer_reduction": "none", "local_weight": 0.2}
    check_op(
        lambda *x: angular_margin(ActivationPairs(list(x[:layers]), list(x[layers:]), [1.0] * layers, **options)),
        student,
        constants=teacher,
    )


def _attention() -> None:
    from checking import check_op

    check_op(
        lambda s, t: attention(AttentionPairs([s], [t], [1.0], absolute=True)),
        [torch.rand(2, 3, 5, 7)],
        constants=[torch.rand(2, 5, 5, 7)],
    )


PROBES: dict[str, Callable[[], None]] = {
    "sp": partial(_sp, 5, 300),
    "sp in bf16": partial(_sp, 5, 320, dtype=torch.bfloat16),
    "sp of two tiles": partial(_sp, 130, 20),
    "sp of two launches": partial(_sp, 2, 4, layers=17),
    "cosine": partial(_cosine, torch.float32),
    "odd cosine": partial(_cosine, torch.float32, 301),
    "cosine in fp64": partial(_cosine, torch.float64),
    "narrow rows": partial(_softmax, 5, 11, torch.full((5,), 0.3)),
    "wide rows": partial(_softmax, 2, 2100, torch.tensor(0.3)),
    "attention": _attention,
    "angular": partial(_angular, 5, 7),
    "angular of two launches": partial(_angular, 2, 2, layers=17),
}


class Fault(NamedTuple):
    name: str
    file: str
    old: str  # once in the file
    new: str
    probe: str


_STAGE = "      __syncthreads();  // this stage is there"
_STAGE_BACK = "        __syncthreads();  // this stage is there"
_ARRIVAL = "__threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) {\n    before"
_LAST = "__threadfence();\n    __syncthreads();\n    if (threadIdx.x == 0) last"
_SWITCH = "copy_async_if(i < rows, tile.at(top, chunk, i), i < rows ? source : data)"
FAULTS = [
    Fault("no wait for the copies", "product_loops.cuh", "copy_async_wait<kStages - 2>();", "", "sp"),
    Fault("a wait for one copy too few", "product_loops.cuh", "copy_async_wait<kStages - 2>();", "copy_async_wait<kStages - 1>();", "sp"),
    Fault("no barrier between the stages", "product_loops.cuh", _STAGE, "//", "sp"),
    Fault("the stage at hand is loaded", "product_loops.cuh", "load(slot ? slot - 1 : kStages - 1);\n      multiply", "load(slot);\n      multiply", "sp"),
    Fault("row mask dropped", "tiles.cuh", _SWITCH, _SWITCH.replace("i < rows", "true"), "sp in bf16"),
    Fault("row mask of single numbers dropped", "tiles.cuh", "i < rows ? gathered", "true ? gathered", "odd cosine"),
    Fault("column mask dropped", "tiles.cuh", "column + i < end ? element", "true ? element", "odd cosine"),
    Fault("rows in the wrong order", "tiles.cuh", "tile.at(lane % 8, chunk ^ lane / 8 % 2, row", "tile.at(lane % 8, chunk, row", "sp"),
    Fault("a tile beyond its stage", "tiles.cuh", "(chunk ^ order) * 16", "(chunk + order) * 16", "sp"),
    Fault("tf32 alone", "tiles.cuh", "  mma_tf32(d, a.rest, b.upper, d);\n", "", "sp"),
    Fault("copies of unaligned rows", "tiles.cuh", "q.stride % kPerChunk<N> == 0 &&\n         q.width % kPerChunk<N> == 0;", "true;", "odd cosine"),
    Fault("all splits write one product", "products.cuh", "block / tiles * n * pitch", "0", "sp"),
    Fault("no mirror image", "products.cuh", "if (r < pitch && c < r && c < n) out", "if (false) out", "sp"),
    Fault("no padding", "products.cuh", "if (r < pitch && c < r && c < n) out", "if (r < n && c < r && c < n) out", "sp"),
    Fault("counters not reset", "products.cuh", "table.counters[threadIdx.x] = 0;", "{}", "sp"),
    Fault("one counter not reset", "products.cuh", "threadIdx.x < table.counts", "threadIdx.x + 1 < table.counts", "sp"),
    Fault("parts one before", "sp_loss.cuh", "to + s * n * pitch", "to + (s - 1) * n * pitch", "sp"),
    Fault("no barrier behind the slices of parts", "sp_loss.cuh", "of_slice[threadIdx.x] = sum;\n    __syncthreads();", "of_slice[threadIdx.x] = sum;", "sp"),
    Fault("arrival without a fence", "sp_loss.cuh", _ARRIVAL, _ARRIVAL.removeprefix("__threadfence();\n  "), "sp"),
    Fault("arrival before the rest of the block", "sp_loss.cuh", _ARRIVAL, _ARRIVAL.replace("__syncthreads();", ""), "sp"),
    Fault("groups that have not arrived", "sp_loss.cuh", "if (!own && !(arrived >> (j / group) & 1)) continue;", "", "sp"),
    Fault("every launch has the first layers", "sp_loss.cuh", "layer = c.first_layer + item", "layer = item", "sp of two launches"),
    Fault("no room for the losses", "gram.cu", "return 8 * words + numbers", "return numbers", "sp"),
    Fault("no room for the parts", "gram.cu", " + parts * int64_t(sizeof(t))", "", "sp"),
    Fault("no wait for the copies, backward", "weighted.cuh", "copy_async_wait<kStages - 2>();", "", "sp"),
    Fault("no barrier between the stages, backward", "weighted.cuh", _STAGE_BACK, "//", "sp of two tiles"),
    Fault("no barrier behind the weights", "weighted.cuh", "weights(1));\n          __syncthreads();", "weights(1));", "sp"),
    Fault("sums of another lane", "weighted.cuh", "      __syncwarp();\n#pragma unroll\n      for (int at", "#pragma unroll\n      for (int at", "sp"),
    Fault("one part of the weights for both", "weighted.cuh", "part * SIDE * bytes", "0 * SIDE * bytes", "sp in bf16"),
    Fault("gradient mask dropped", "weights.cuh", "if (i >= p.own.count || column >= p.own.width) return;", "", "sp"),
    Fault("weights mask dropped", "weights.cuh", "if (from + n < p.q.count) x[n]", "x[n]", "sp"),
    Fault("strides swapped", "weights.cuh", "return i * row_stride + k * column_stride", "return i * column_stride + k * row_stride", "cosine"),
    Fault("no barrier behind the loads", "product_loops.cuh", "      __syncthreads();\n#pragma unroll\n      for (int d", "#pragma unroll\n      for (int d", "cosine in fp64"),
    Fault("shared index + 1", "product_loops.cuh", "a[r] = tile_a[d][y + 16 * r];", "a[r] = tile_a[d][y + 16 * r + 1];", "cosine in fp64"),
    Fault("accumulator without a start", "product_loops.cuh", "double sum_[4][4] = {}", "double sum_[4][4]", "cosine in fp64"),
    Fault("last block without a fence", "cosine.cuh", _LAST, _LAST.removeprefix("__threadfence();\n    "), "cosine"),
    Fault("every block is the last", "cosine.cuh", "    if (!last) return;\n", "", "cosine"),
    Fault("counters of tiles not reset", "cosine.cuh", 'check(cudaMemsetAsync(arrived, 0, 4 * layout.tiles, stream), "gram counters");', "{}", "cosine"),
    Fault("product mask dropped", "cosine.cuh", "if (part.row + row >= n || part.column + column >= m) continue;", "", "cosine"),
    Fault("no room for the splits", "cosine.cuh", "tiles * splits * (side + 2)", "tiles * (side + 2)", "cosine in fp64"),
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
    Fault("no barrier behind the slices", "energy.cuh", "partial[slice][lane] = sum;\n  __syncthreads();", "partial[slice][lane] = sum;", "angular"),
    Fault("one slice too many", "energy.cuh", "k < kSlices; ++k) sum", "k <= kSlices; ++k) sum", "angular"),
    Fault("a map too few", "energy.cuh", "return maps * pixels_of(x)", "return (maps - 1) * pixels_of(x)", "angular"),
    Fault("a map without a start", "angular_margin.cu", "maps.h[n] = 0;", "continue;", "angular"),
    Fault("the gradient into the input", "energy.cu", "store<T>(a.type, layer.out, at,", "store<T>(a.type, const_cast<void*>(a.data), at,", "angular"),
    Fault("all layers' maps in one place", "bindings_energy.h", "layer.offset = pixels;", "layer.offset = 0;", "angular of two launches"),
    Fault("half of the block at the barriers", "angular_maps.cuh", "  e = reduce_block(e, ", "  if (threadIdx.x < 128) e = reduce_block(e, ", "angular"),
    Fault("a sign dropped", "energy.cu", "inner += double(sign(d)) * double(u);", "inner += double(u);", "attention"),
    Fault("unit maps of another sample", "energy.cu", "offset = layer.offset + sample * pixels;", "offset = layer.offset;", "attention"),
    Fault("energies without a teacher", "energy.cuh", "networks = teachers ? 2 : 1", "networks = 1", "attention"),
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
