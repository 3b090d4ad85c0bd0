"""Times every case and writes what was found as JSON, Markdown and pictures.

    python -m benchmarks.report                         everything: results/<machine>.json, .md, -*.png
    python -m benchmarks.report --only amd --seconds 3  the cases whose label contains a word
    python -m benchmarks.report --base main             our backends alone, beside those of another commit

Correctness comes first: a backend of ours that is off from fp64 stops the run; the published formulas' errors are in
the tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kdkernels

from . import (
    bench_angular_margin,
    bench_channel_gram,
    bench_energy,
    bench_gram,
    bench_logit_losses,
    bench_losses,
    bench_softmax_kl,
)
from .bench_training_step import training_step
from .cases import PEERS, Case, Inputs, Provider, check, errors, oracle, providers
from .timing import CUDA, Timed, cold, graphed, launches, machine, peak_memory, quantile, take_turns, timed

CASES: list[Case] = [
    *bench_softmax_kl.CASES,
    *bench_logit_losses.CASES,
    *bench_gram.CASES,
    *bench_energy.CASES,
    *bench_angular_margin.CASES,
    *bench_channel_gram.CASES,
    *bench_losses.CASES,
]
RESULTS = Path(__file__).parent / "results"


def measure(case: Case, seconds: float, least: int, names: list[str] | None = None) -> dict[str, Any]:
    """One case as a JSON row: what each provider took, allocated and got wrong."""
    inputs = case.inputs()
    truth = oracle(case, inputs)
    torch._dynamo.reset()
    found: dict[str, dict[str, Any]] = {}
    able, failed = {}, {}
    for name, provider in providers(case, inputs, names).items():
        try:
            error = errors(provider, inputs, truth)
        except RuntimeError as problem:  # a formula that cannot compute the case
            if name not in PEERS and not isinstance(problem, kdkernels.BackendError):
                raise
            failed[name] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}"
            continue
        check(case, name, error)
        found[name] = {"loss_error": error[0], "gradient_error": error[1], "peak_bytes": peak_memory(provider, inputs)}
        if CUDA:
            found[name]["launches"] = launches(provider, inputs)
        able[name] = provider
    del truth
    copies = cold(case, inputs)
    turns = take_turns({name: partial(timed, provider, copies) for name, provider in able.items()}, seconds, least)
    if CUDA:
        for name, times in take_turns(_graphs(able, inputs), seconds / 2, least).items():
            turns[name].update(times)
    for name, times in turns.items():
        found[name].update(_summary(times))
    del inputs, copies
    gc.collect()
    return {
        "group": case.group,
        "case": case.label,
        "gain": case.gain,
        "bytes": case.bytes,
        "flops": case.flops,
        "dtype": str(case.dtype).removeprefix("torch."),
        "providers": found,
        "failed": failed,
    }


def _graphs(able: dict[str, Provider], inputs: Inputs) -> dict[str, Timed]:
    """CUDA graphs of the steps; max-autotune makes graphs of its own."""
    replays = {}
    for name, provider in able.items():
        if name != "compile max-autotune":
            try:
                replays[name] = graphed(provider, inputs)
            except RuntimeError as problem:
                print(f"  {name} cannot be captured: {str(problem).splitlines()[0]}", file=sys.stderr)
    return replays


def _summary(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Median, 20th and 80th percentile in seconds."""
    return {what: [quantile(values, q) for q in (0.5, 0.2, 0.8)] for what, values in times.items()}


def slug(device: str) -> str:
    """A file name: "NVIDIA H100 80GB HBM3" is h100."""
    known = re.search(r"\b([HABL]\d{2,3}S?|RTX \d+)\b", device) if CUDA else None
    return re.sub(r"[^a-z0-9]+", "-", (known[1] if known else device).lower()).strip("-")


def run(
    cases: list[Case], seconds: float, least: int, names: list[str] | None, step: bool, minutes: float
) -> dict[str, Any]:
    start = time.monotonic()
    result: dict[str, Any] = {"machine": machine(), "cases": [], "not_reached": []}
    for case in cases:
        if time.monotonic() - start > 60 * minutes:
            result["not_reached"].append(case.label)
            continue
        row = measure(case, seconds, least, names)
        result["cases"].append(row)
        line = "  ".join(f"{n} {p['step'][0] * 1e3:.3f}" for n, p in row["providers"].items())
        print(f"{time.monotonic() - start:5.0f} s  {case.label}: {line} ms", flush=True)
    if step:
        result["training_step"] = training_step()
        print(f"{time.monotonic() - start:5.0f} s  training step", flush=True)
    result["seconds"] = time.monotonic() - start
    return result


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose label contains this")
    parser.add_argument("--seconds", type=float, default=5.0, help="to spend on the rounds of a case")
    parser.add_argument("--rounds", type=int, default=5, help="at least")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further case after so many")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: PyTorch's default")
    parser.add_argument("--base", metavar="REV", help="compare our backends with those of another commit")
    parser.add_argument("--providers", help="comma-separated; default: all that run here")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the report")
    parser.add_argument("--json", type=Path, help="write the JSON there and no report")
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = [case for case in CASES if options.only in case.label]
    if not cases:
        parser().error(f"no case contains {options.only!r}; there are: {', '.join(case.label for case in CASES)}")
    if options.base:
        from .compare import compare

        print(compare(options.base, options.only, options.seconds))
        return
    names = options.providers.split(",") if options.providers else None
    step = not options.only and names is None
    result = run(cases, options.seconds, options.rounds, names, step, options.minutes)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
        return
    from .render import write

    for path in write(result, options.output / slug(result["machine"]["device"])):
        print(path)


if __name__ == "__main__":
    main()
