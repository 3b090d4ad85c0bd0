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
from kdkernels.ops.softmax_kl import Labels, Rows, Terms, native, softmax_kl

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


def _in_place() -> None:
    labels = torch.arange(5)
    x = Rows(torch.randn(5, 23), torch.randn(5, 23), Labels(labels), Terms(0.1, 0.2, 0.3, 0.4), 3.0)
    _, stats, scale = native.forward(x, True)
    expected = native.backward(torch.ones(()), x, stats, scale)
    torch.testing.assert_close(native.backward(torch.ones(()), x, stats, scale, in_place=True), expected)


def _divergence(rows: int, classes: int) -> None:
    from checking import check_op

    student, teacher = torch.randn(rows, classes), torch.randn(rows, classes)
    check_op(
        lambda s, t: softmax_kl(Rows(s, t, terms=Terms(kl=1.0), temperature=2.5, divergence="reverse")),
        [student],
        constants=[teacher],
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
    "sp in bf16": partial(_sp, 5, 320, dtype=torch.bfloat16),
    "sp of two tiles": partial(_sp, 130, 20),
    "sp of two launches": partial(_sp, 2, 4, layers=17),
    "cosine": partial(_cosine, torch.float32),
    "odd cosine": partial(_cosine, torch.float32, 301),
    "cosine in fp64": partial(_cosine, torch.float64),
    "narrow rows": partial(_softmax, 5, 11, torch.full((5,), 0.3)),
    "wide rows": partial(_softmax, 2, 2100, torch.tensor(0.3)),
    "unaligned rows": partial(_softmax, 3, 1031, torch.tensor(0.3)),
    "rows in their gradient's place": _in_place,
    "rows in shared memory": partial(_divergence, 1, 7001),
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
    Fault("row bound dropped", "softmax_kl_row.cuh", "real = of_thread < rows;", "real = true;", "narrow rows"),
    Fault("a team behind the last row reads", "softmax_kl_row.cuh", "its_team.real && l.keep", "l.keep", "rows in their gradient's place"),
    Fault("no barrier before a row's sums", "softmax_kl_row.cuh", "    __syncthreads();  // whoever used `shared` before is done\n", "", "wide rows"),
    Fault("no barrier behind a row's sums", "softmax_kl_row.cuh", "shared[32 * i + warp] = x[i];\n    __syncthreads();", "shared[32 * i + warp] = x[i];", "wide rows"),
    Fault("mask dropped at the end of a row", "softmax_kl_row.cuh", "return k >= 0 && k + count <= classes;", "return k >= 0;", "unaligned rows"),
    Fault("mask dropped at the beginning of a row", "softmax_kl_row.cuh", "return k >= 0 && k + count <= classes;", "return k + count <= classes;", "unaligned rows"),
    Fault("rows begin at a boundary", "softmax_kl_row.cuh", "int index(int v, int j) const { return v * count + j - phase; }", "int index(int v, int j) const { return v * count + j; }", "unaligned rows"),
    Fault("packs of the networks in one place", "softmax_kl_row.cuh", "kept_[slot + blockDim.x] = b;", "kept_[slot] = b;", "rows in shared memory"),
    Fault("a copy without its tail", "softmax_kl.cu", "slots = static_cast<int>(ceil_div(packs, width));", "slots = static_cast<int>(packs / width);", "rows in shared memory"),
    Fault("shared memory not asked for", "softmax_kl.cu", "static_cast<int>(bytes)),", "0),", "rows in shared memory"),
    Fault("sums that count from elsewhere", "softmax_kl_sums.cuh", "    t_max = most[1];\n    count_from(e, s_max, t_max);", "    t_max = most[1];", "wide rows"),
    Fault("a label among the others", "softmax_kl_sums.cuh", "zs[j] = zt[j] = -infinity<T>();", "zt[j] = -infinity<T>();", "narrow rows"),
    Fault("statistics overwritten", "softmax_kl_row.h", "to[2 * x.rows] = static_cast<T>(r.log_p)", "to[x.rows] = static_cast<T>(r.log_p)", "narrow rows"),
    Fault("workspace a row short", "softmax_kl.cu", "shape(x).partials; });", "shape(x).partials - 1; });", "narrow rows"),
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
