"""linear_kd_loss: time over that of the matrix products alone, and the peak memory of a process, beside other ways.

    python -m benchmarks.bench_linear                             a table, Markdown
    python -m benchmarks.bench_linear --shapes 1024x512x32000 --rounds 9 --only products,kdkernels
    python -m benchmarks.bench_linear --memory-of-8b              computed, not measured

tokens x hidden width x vocabulary, fp32, forward KL at temperature 1, gradients of hidden states and weights. They
take turns; "products" is the four products of a step, of whole matrices, which nobody can do without. Memory is what a
process of its own needs at most on top of its inputs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdkernels import Head, kd_loss, linear_kd_loss

from .cases import DEVICE
from .timing import quantile, take_turns

SHAPES = ("4096x64x32000", "1024x512x32000", "512x1024x128256")
Networks = tuple[Tensor, Tensor, Tensor, Tensor]  # the student's hidden states and weights, the teacher's


def networks(shape: str) -> Networks:
    tokens, width, vocabulary = map(int, shape.split("x"))
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden, t_hidden = (torch.randn(tokens, width, device=DEVICE, generator=generator) for _ in range(2))
    weight, t_weight = (torch.randn(vocabulary, width, device=DEVICE, generator=generator) for _ in range(2))
    return hidden.requires_grad_(), weight.mul_(2 * width**-0.5).requires_grad_(), t_hidden, t_weight.mul_(width**-0.5)


def products(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor) -> None:
    with torch.no_grad():
        z, _ = hidden @ weight.T, t_hidden @ t_weight.T
        hidden.grad, weight.grad = z @ weight, z.T @ hidden


def ours(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor) -> None:
    linear_kd_loss(Head(hidden, weight), Head(t_hidden, t_weight)).backward()


def whole_logits(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor) -> None:
    kd_loss(hidden @ weight.T, t_hidden @ t_weight.T, temperature=1.0).backward()


def kl(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor) -> Tensor:
    """Summed over tokens, as it is usually written."""
    log_q, log_p = (hidden @ weight.T).log_softmax(-1), (t_hidden @ t_weight.T).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def eager(*x: Tensor) -> None:
    (kl(*x) / len(x[0])).backward()


def liger(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor, chunk: int = 1024) -> None:
    """Liger-Kernel's chunked losses, uncompiled: 1024 tokens at a time, gradients added up in the weights' dtype."""
    d_hidden, d_weight = [], torch.zeros_like(weight)
    for h, t in zip(hidden.split(chunk), t_hidden.split(chunk), strict=True):
        h, w = h.detach().requires_grad_(), weight.detach().requires_grad_()
        of_h, of_w = torch.autograd.grad(kl(h, w, t, t_weight) / len(hidden), (h, w))
        d_hidden.append(of_h)
        d_weight += of_w
    hidden.grad, weight.grad = torch.cat(d_hidden), d_weight


def checkpointed(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor, chunk: int = 256) -> None:
    """TRL's way: chunks whose logits are made again in the backward pass."""
    total = hidden.new_zeros(())
    for h, t in zip(hidden.split(chunk), t_hidden.split(chunk), strict=True):
        total = total + checkpoint(kl, h, weight, t, t_weight, use_reentrant=False)
    (total / len(hidden)).backward()


def compiled() -> Callable[..., None]:
    function = torch.compile(kl, dynamic=False)
    return lambda *x: (function(*x) / len(x[0])).backward()


CANDIDATES: dict[str, Callable[[], Callable[..., None]]] = {
    "products": lambda: products,
    "kdkernels": lambda: ours,
    "kd_loss on whole logits": lambda: whole_logits,
    "eager": lambda: eager,
    "torch.compile": compiled,
    "Liger's chunks": lambda: liger,
    "TRL's checkpointed chunks": lambda: checkpointed,
}


def timed(step: Callable[..., None], inputs: Networks) -> dict[str, float]:
    inputs[0].grad = inputs[1].grad = None
    _wait()
    start = time.perf_counter()
    step(*inputs)
    _wait()
    return {"step": time.perf_counter() - start}


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def check(step: Callable[..., None], inputs: Networks, expected: list[Tensor]) -> None:
    """Nothing is timed that has other gradients than eager."""
    inputs[0].grad = inputs[1].grad = None
    step(*inputs)
    for x, e in zip(inputs, expected, strict=False):
        error = float((x.grad - e).norm() / e.norm())  # type: ignore[operator]
        assert error < 1e-4, f"a gradient is off by {error}"


def peak(name: str, shape: str) -> int:
    """Bytes that one step needs at most on top of its inputs, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_linear", "--step", name, "--shapes", shape]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def step_in_this_process(name: str, shape: str) -> int:
    inputs, step = networks(shape), CANDIDATES[name]()
    small = networks("8x4x16")
    step(*small)  # threads, kernels and what the compiler takes
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(*inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again; ru_maxrss begins with the parent's
    before = _resident("VmRSS")
    step(*inputs)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM)."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) << 10


def table(shape: str, names: list[str], rounds: int) -> None:
    inputs = networks(shape)
    eager(*inputs)
    expected = [x.grad.clone() for x in inputs[:2]]  # type: ignore[union-attr]
    steps = {name: CANDIDATES[name]() for name in names}
    for name, step in steps.items():
        if name != "products":
            check(step, inputs, expected)
    found = take_turns({name: partial(timed, step, inputs) for name, step in steps.items()}, 0.0, rounds)
    seconds = {name: quantile(times["step"], 0.5) for name, times in found.items()}
    print(f"\n| {shape} | s | over the products | peak MB |\n|---|---|---|---|")
    for name, value in seconds.items():
        over = value / seconds["products"]
        print(f"| {name} | {value:.3f} | {over:.2f} | {peak(name, shape) / 1e6:.0f} |", flush=True)


def memory_of_8b(tokens: int = 8192, width: int = 4096, vocabulary: int = 128256, chunk: int = 1024) -> None:
    """Bytes of the tensors that each way holds at its worst moment beside inputs and gradients; nothing is run."""
    matrix = tokens * vocabulary
    rows = {
        "eager: both logits in bf16, both log-probabilities and their difference's gradient in fp32": matrix * (4 + 12),
        "kd_loss on whole logits: both logits and a gradient in bf16": matrix * 6,
        "Liger's chunks of 1024 tokens, fp32: two logits, two log-probabilities, one gradient": 1024 * vocabulary * 20,
        f"linear_kd_loss: two fp32 matrices of {chunk} tokens": chunk * vocabulary * 8,
        "    and the gradient of the hidden states in fp32": tokens * width * 4,
        "    and the gradient of the weight in fp32, unless it is frozen": vocabulary * width * 4,
    }
    print(f"\n| computed for {tokens} tokens x {width} x {vocabulary} | GB |\n|---|---|")
    for what, size in rows.items():
        print(f"| {what} | {size / 1e9:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(CANDIDATES), help="candidates, comma-separated")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # what ``peak`` runs
    parser.add_argument("--memory-of-8b", action="store_true")
    options = parser.parse_args()
    if options.memory_of_8b:
        memory_of_8b()
        return
    if options.step:
        print(step_in_this_process(options.step, options.shapes))
        return
    for shape in options.shapes.split(","):
        table(shape, options.only.split(","), options.rounds)


if __name__ == "__main__":
    main()
