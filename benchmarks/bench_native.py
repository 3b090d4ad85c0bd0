"""The native CPU kernels against the published formulas, eager and compiled: forward + backward, fp32, 2 threads.

    python benchmarks/bench_native.py [--rounds 30] [--no-compile] [--only sp] [--threads 1 --cpu-time]

The candidates take turns in one process, so that a noisy machine is noisy for all of them. Printed are medians and the
ratios to the native op: above 1, native is faster.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import published  # noqa: E402

import kdkernels  # noqa: E402
from kdkernels.ops.gram import cosine_similarity  # noqa: E402
from kdkernels.ops.softmax_kl import softmax_kl  # noqa: E402

Candidate = Callable[[], object]


def step(loss: Callable[..., Tensor], student: Tensor, *constants: Tensor) -> Candidate:
    def run() -> None:
        student.grad = None
        loss(student, *constants).sum().backward()

    return run


def measure(
    candidates: dict[str, Candidate], rounds: int, clock: Callable[[], float], quantile: float
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
        candidate()
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = clock()
            candidate()
            times[name].append(clock() - start)
    return {name: sorted(values)[round(quantile * (rounds - 1))] for name, values in times.items()}


def on(backend: str, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Tensor) -> Tensor:
        with kdkernels.use_backend(backend):
            return loss(*args)

    return run


def correlation(student: Tensor, teacher: Tensor, views: int = 4, tau: float = 0.5) -> Tensor:
    """MLKD's correlation on the two ops: cosines of the views (rows r > 0) with the base images (rows r = 0)."""
    matrices = []
    for x in (student, teacher):
        x = x.view(-1, views, x.shape[1])
        matrices.append(cosine_similarity(x[:, 1:].flatten(0, 1), x[:, 0]))
    return softmax_kl(matrices[0], matrices[1], temperature=tau, kl_weight=1.0)


def published_correlation(student: Tensor, teacher: Tensor, views: int = 4, tau: float = 0.5) -> Tensor:
    """The same as published: operands broadcast to ((V - 1) B, d, B) for F.cosine_similarity."""
    matrices = []
    for x in (student, teacher):
        x = x.view(-1, views, x.shape[1])
        rows, columns = x[:, 1:].flatten(0, 1), x[:, 0]
        matrices.append(F.cosine_similarity(rows[:, :, None], columns.t()[None], dim=1) / tau)
    return F.kl_div(F.log_softmax(matrices[0], 1), F.softmax(matrices[1], 1), reduction="batchmean")


def cases() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]]:
    """name: (ours, published, (student, constants...))"""
    torch.manual_seed(0)
    result: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {}
    for n, c in ((256, 1000), (1024, 1000)):
        labels = (torch.randint(c, (n,)), torch.randint(c, (n,)), torch.tensor(0.3))
        logits = (torch.randn(n, c) * 2, torch.randn(n, c) * 2)
        result[f"softmax_kl {n}x{c}"] = (kdkernels.stkd_loss, published.stkd, (*logits, *labels))
    for op, ours, theirs, shapes in (
        ("sp", kdkernels.sp_loss, published.sp, ((64, 64, 32, 32), (128, 256, 8, 8))),
        ("amd", kdkernels.amd_loss, published.amd, ((64, 64, 32, 32), (64, 256, 8, 8))),
    ):
        for shape in shapes:
            maps = (torch.randn(shape).relu(), torch.randn(shape).relu())
            result[f"{op} {'x'.join(map(str, shape))}"] = (ours, theirs, maps)
    result["mlkd correlation B=64 V=4 d=512"] = (
        correlation,
        published_correlation,
        (torch.randn(256, 512), torch.randn(256, 512)),
    )
    return result


def matrix_products(student: Tensor, teacher: Tensor) -> Candidate:
    """What any SP has to compute if every product is a plain one: two Gram matrices and W Q."""
    s, t = student.detach().flatten(1), teacher.flatten(1)
    w = torch.randn(len(s), len(s))
    return lambda: (s @ s.t(), t @ t.t(), w @ s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantile", type=float, default=0.5, help="of the rounds' times; 0 is the best")
    parser.add_argument("--cpu-time", action="store_true", help="processor time: for a machine that others use too")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    for name, (ours, theirs, (student, *constants)) in cases().items():
        if options.only not in name:
            continue
        student.requires_grad_()
        candidates = {
            "native": step(on("native", ours), student, *constants),
            "reference": step(on("reference", ours), student, *constants),
            "eager": step(theirs, student, *constants),
        }
        if not options.no_compile:
            torch._dynamo.reset()
            candidates["compile"] = step(torch.compile(theirs), student, *constants)
        if name.startswith("sp"):
            candidates["3 mm"] = matrix_products(student, constants[0])
        result = measure(
            candidates, min(options.rounds, 8) if "mlkd" in name else options.rounds, clock, options.quantile
        )
        ratios = "  ".join(f"{k} {v / result['native']:.2f}x" for k, v in result.items() if k != "native")
        print(f"{name:34} native {result['native'] * 1e3:8.3f} ms   {ratios}", flush=True)


if __name__ == "__main__":
    main()
