"""Clocks: candidates take turns in one process, on inputs that no cache holds; and what the machine can do at most."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels

from .cases import DEVICE, Case, Inputs, Provider, call, clear, upstream

CUDA = DEVICE == "cuda"
COPIES = 64  # at most
Times = dict[str, list[float]]  # seconds by what was timed
Timed = Callable[[], dict[str, float]]


def cold(case: Case, first: Inputs) -> Iterator[Inputs]:
    """Copies of the inputs in turn, so many that none is in a cache when it comes round. The code stays warm, as it is
    between the losses of a step. On a GPU one copy: ``spoil`` empties its cache."""
    size = sum(x.numel() * x.element_size() for tensors in first for x in tensors)
    copies = 1 if CUDA else min(COPIES, 1 + 2 * _last_level_cache() // max(size, 1))
    return cycle([first, *(case.inputs() for _ in range(copies - 1))])


def _last_level_cache() -> int:
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) << {"K": 10, "M": 20}[s[-1]] for s in sizes if s[-1:] in "KM"), default=32 << 20)


@cache
def _spoiler() -> Tensor:
    return torch.zeros(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device=DEVICE)


def spoil() -> None:
    """Leave nothing in the GPU's cache."""
    _spoiler().add_(1)


def timed(provider: Provider, copies: Iterator[Inputs]) -> dict[str, float]:
    """Seconds of one forward pass, and of one step of forward and backward. On a GPU the step ends when its result is
    there; "host" is when its calls have returned, "device" from its first to its last kernel."""
    inputs = next(copies)
    clear(inputs)
    with kdkernels.use_backend(provider.backend):
        return _timed_on_gpu(provider, inputs) if CUDA else _timed_on_cpu(provider, inputs)


def _timed_on_cpu(provider: Provider, inputs: Inputs) -> dict[str, float]:
    upstream(provider.gradient, torch.float32)  # made before the clock starts
    start = time.perf_counter()
    loss = call(provider.loss, inputs)
    middle = time.perf_counter()
    loss.backward(upstream(provider.gradient, loss.dtype))
    end = time.perf_counter()
    return {"forward": middle - start, "step": end - start}


def _timed_on_gpu(provider: Provider, inputs: Inputs) -> dict[str, float]:
    upstream(provider.gradient, torch.float32)  # made before the clock starts
    spoil()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    events[0].record()
    loss = call(provider.loss, inputs)
    events[1].record()
    loss.backward(upstream(provider.gradient, loss.dtype))
    events[2].record()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    forward, device = (events[0].elapsed_time(e) / 1e3 for e in events[1:])
    return {"forward": forward, "step": wall, "host": host, "device": device}


def graphed(provider: Provider, inputs: Inputs) -> Timed:
    """Forward and backward as one CUDA graph; each call replays it on a cold cache."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            provider.step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        provider.step(inputs)

    def replay() -> dict[str, float]:
        spoil()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return {"graph": start.elapsed_time(end) / 1e3}

    return replay


def take_turns(candidates: dict[str, Timed], seconds: float, least: int) -> dict[str, Times]:
    """Rounds of all candidates in a random order, at least ``least``, until ``seconds`` are spent."""
    order, shuffle = list(candidates), random.Random(0).shuffle
    found: dict[str, Times] = {name: {} for name in candidates}
    for candidate in candidates.values():  # once more than the check before: compilers may specialise late
        candidate()
    end = time.monotonic() + seconds
    rounds = 0
    while rounds < least or (time.monotonic() < end and rounds < 200):
        shuffle(order)
        for name in order:
            for what, value in candidates[name]().items():
                found[name].setdefault(what, []).append(value)
        rounds += 1
    return found


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def peak_memory(provider: Provider, inputs: Inputs) -> int:
    """Bytes that forward and backward allocate at most at a time through PyTorch, the gradient included."""
    clear(inputs)
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        provider.step(inputs)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        provider.step(inputs)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def launches(provider: Provider, inputs: Inputs) -> int:
    """CUDA kernels and copies of one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        provider.step(inputs)
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


# ---- the machine


def _median_time(run: Callable[[], Any], times: int = 9) -> float:
    found = []
    run()
    for _ in range(times):
        if CUDA:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            found.append(time.perf_counter() - begin)
    return quantile(found, 0.5)


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, what is read and what is written both counted."""
    source = torch.ones((1 << 30 if CUDA else 1 << 26), device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _median_time(lambda: target.copy_(source))


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP per second of a large product."""
    n = 8192 if CUDA else 1024 if dtype == torch.float32 else 512  # half precision crawls on some CPUs
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * n**3 / _median_time(lambda: a @ b)


def machine() -> dict[str, Any]:
    """What the times were taken on."""
    import triton

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else _processor(),
        "threads": None if CUDA else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "copy_bandwidth": copy_bandwidth(),
        "matmul_rate": {
            str(d).removeprefix("torch."): matmul_rate(d) for d in (torch.float32, torch.bfloat16, torch.float16)
        },
    }
    if not CUDA:
        found["load_average"] = os.getloadavg()[0]
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it."""
    here = Path(__file__).parent
    try:
        revision = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=here, text=True).strip()
        dirty = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=here, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + "+" * bool(dirty)
