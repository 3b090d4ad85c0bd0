"""A report's JSON as Markdown tables and pictures: ``python -m benchmarks.render benchmarks/results/h100.json``."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TITLES = {
    "softmax_kl": "Logits: `kd_loss`, `stkd_loss`",
    "logits": "Logits: `nkd_loss`, `dist_loss`, `mlld_loss`, `cwd_loss`",
    "gram": "One layer pair: `sp_loss`",
    "energy": "Energy maps: `at_loss`, `ft_loss`",
    "angular_margin": "One layer pair: `amd_loss`",
    "channel_gram": "Channel Grams: `nst_loss`, `ickd_loss`, `fsp_loss`",
    "losses": "Whole losses",
}
METHOD = """\
Forward and backward from an upstream gradient of 0.7 (2^16 times that in fp16). All candidates take turns in one
process, in a random order, {cold}; medians. **eager** and **compile** are the formula as published, in PyTorch and
under torch.compile (the better of default and max-autotune), **reference** is ours in plain PyTorch; these columns
are their time over ours: above 1, ours is faster. **share** is of the copy bandwidth measured here, or of the matmul
rate where that allows less, for the bytes and operations that the loss needs at least. **peak MB** is what a step
allocates through PyTorch, ours / eager; **error** the gradient's against fp64, ours / eager."""
GAIN = """\
**gain** is where a row's ratio comes from. **kernel**: the same algebra in fewer passes over memory. **algebra**: fewer
operations or less memory than the formula as published; what plain PyTorch would have of that, the column reference
shows. SP computes half of each symmetric product, AMD stores no squared features, MLKD's correlation is a matrix
product and not d broadcast copies of a (V - 1) B x B matrix. **baseline**: this machine takes the published formula at
least twice as long per element as on the rows beside it (half precision, large temporaries); expect less elsewhere."""
EXTREMES = 3  # rows whose ratios are large for reasons of their own
SUMMARY = (
    "kd 64x100",
    "stkd 256x1000",
    "dkd 1024x1000",
    "kd jsd 1024x1000",
    "dist 1024x1000",
    "kd 8192x32000",
    "sp resnet8x4, 3 stages",
    "sp resnet50 256x2048x7x7",
    "amd resnet8x4, 3 stages",
    "amd resnet50 256x2048x7x7",
    "at resnet8x4, 3 stages",
    "nst wrn16-2 64x128x8x8",
    "rkd 128x512",
    "pkt 256x64",
    "mlkd correlation 16 images x 4 views x 128",
    "mlkd correlation 64 images x 4 views x 512",
)
COMPILED = ("compile", "compile max-autotune")


def ours(row: Row) -> str:
    """What auto runs: our first backend."""
    return next(iter(row["providers"]))


def step(row: Row, name: str) -> float:
    return float(row["providers"][name]["step"][0])


def best_compile(row: Row) -> str | None:
    able = [name for name in COMPILED if name in row["providers"]]
    return min(able, key=lambda name: step(row, name)) if able else None


def ratio(row: Row, name: str | None) -> float | None:
    return None if name is None or name not in row["providers"] else step(row, name) / step(row, ours(row))


def geomean(values: Iterable[float | None]) -> float:
    logs = [math.log(x) for x in values if x is not None]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


@cache
def _gains() -> dict[str, str]:
    from .report import CASES

    return {case.label: case.gain for case in CASES}


def gain(row: Row) -> str:
    """Where the ratio comes from: as measured, or by the case's name in a report that is older than the column."""
    return str(row["gain"]) if "gain" in row else _gains().get(row["case"], "")


def trimmed(values: Iterable[float | None]) -> float:
    """The geometric mean without the largest few."""
    return geomean(sorted(x for x in values if x is not None)[:-EXTREMES])


def means(rows: list[Row]) -> str:
    eager, compiled = [ratio(row, "eager") for row in rows], [ratio(row, best_compile(row)) for row in rows]
    return (
        f"Geometric means over {len(rows)} rows: {geomean(eager):.2f} against eager, {geomean(compiled):.2f} against "
        f"the better compile; without the {EXTREMES} largest of each: {trimmed(eager):.2f} and {trimmed(compiled):.2f}."
    )


def lost(rows: list[Row]) -> list[str]:
    """The rows where the published formula is faster than ours."""
    found = []
    for row in rows:
        for name in ("eager", best_compile(row), "liger"):
            value = ratio(row, name)
            if value is not None and value < 1:
                found.append(f"{row['case']}: {name} takes {value:.2f} of our time")
    return found


def roof(row: Row, machine: dict[str, Any]) -> float:
    """Seconds that the machine needs at its measured best: for the bytes, or for the products, whichever is longer."""
    rates = machine["matmul_rate"]
    rate = max(rates[row["dtype"]], rates["float32"])  # some CPUs have no half-precision products worth the name
    return float(max(row["bytes"] / machine["copy_bandwidth"], row["flops"] / rate))


def share(row: Row, machine: dict[str, Any]) -> tuple[str, float]:
    """GB/s, or GFLOP/s where products take longer, and the share of the machine's best."""
    mine = row["providers"][ours(row)]
    time = mine.get("graph", mine["step"])[0]
    bound_by_products = row["flops"] and roof(row, machine) > row["bytes"] / machine["copy_bandwidth"]
    rate = f"{row['flops'] / time / 1e9:.0f} GFLOP/s" if bound_by_products else f"{row['bytes'] / time / 1e9:.1f} GB/s"
    return rate, roof(row, machine) / time


def milliseconds(times: list[float]) -> str:
    median, low, high = (t * 1e3 for t in times)
    digits = 3 if median < 1 else 2 if median < 100 else 0
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _times(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}" if x < 10 else f"{x:.0f}"


def _bytes(n: int) -> str:
    return f"{n / 1e6:.2f}" if n < 1e7 else f"{n / 1e6:.0f}"


def _error(x: float) -> str:
    return f"{x:.0e}" if math.isfinite(x) else "NaN"


def _row(row: Row, machine: dict[str, Any]) -> list[str]:
    mine, compiled, found = ours(row), best_compile(row), row["providers"]
    speed, part = share(row, machine)
    eager = found.get("eager")
    cells = [
        row["case"],
        f"{milliseconds(found[mine]['step'])} {mine}",
        milliseconds(found[mine]["forward"]).split(" ")[0],
        _times(ratio(row, "eager")),
        "" if compiled is None else f"{_times(ratio(row, compiled))}{' (max)' if compiled != 'compile' else ''}",
        _times(ratio(row, "reference")) if mine != "reference" else "",
        gain(row),
        f"{speed}, {part:.0%}",
        f"{_bytes(found[mine]['peak_bytes'])} / {_bytes(eager['peak_bytes']) if eager else '-'}",
        f"{_error(found[mine]['gradient_error'])} / {_error(eager['gradient_error']) if eager else '-'}",
    ]
    if "device" in found[mine]:
        graph = found[mine].get("graph")
        cells += [
            f"{found[mine]['device'][0] * 1e6:.0f}",
            "" if graph is None else f"{graph[0] * 1e6:.0f}",
            f"{found[mine]['host'][0] * 1e6:.0f}",
            str(found[mine]["launches"]),
        ]
    return cells


HEADINGS = [
    "case",
    "ms (20 to 80 %)",
    "forward",
    "eager",
    "compile",
    "reference",
    "gain",
    "rate, share",
    "peak MB",
    "error",
]
GPU_HEADINGS = ["device us", "graph us", "host us", "launches"]


def table(headings: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in rows])


def markdown(result: dict[str, Any], pictures: list[str]) -> str:
    machine, rows = result["machine"], result["cases"]
    gpu = any("device" in row["providers"][ours(row)] for row in rows)
    facts = [f"{machine['device']}" + (f", {machine['threads']} threads" if machine["threads"] else "")]
    facts += [f"torch {machine['torch']}, triton {machine['triton']}, Python {machine['python']}"]
    facts += [f"copy {machine['copy_bandwidth'] / 1e9:.1f} GB/s"]
    facts += [f"matmul {k} {v / 1e9:.0f} GFLOP/s" for k, v in machine["matmul_rate"].items()]
    cold = "the GPU's cache emptied before each step" if gpu else "on inputs that no cache holds (copies rotate)"
    parts = [
        f"# Speed on {machine['device']}",
        f"{'; '.join(facts)}; commit {machine['commit']}; {result['seconds'] / 60:.0f} minutes.",
        METHOD.format(cold=cold),
    ]
    parts += [f"![{'Ratios' if 'ratios' in p else 'Roofline'}]({p})" for p in pictures]
    parts += ["<!-- --8<-- [start:tables] -->"]  # what the documentation shows
    parts += [means(rows), GAIN]
    for group in dict.fromkeys(row["group"] for row in rows):
        parts.append(f"## {TITLES[group]}")
        chosen = [_row(row, machine) for row in rows if row["group"] == group]
        parts.append(table(HEADINGS + GPU_HEADINGS * gpu, chosen))
    if "training_step" in result:
        parts += ["## What a loss adds to a training step", training_table(result["training_step"])]
    parts += ["## Rows that we lose", "\n".join(f"- {line}" for line in lost(rows)) or "None."]
    if result.get("not_reached"):
        parts += ["## Not reached in the time given", ", ".join(result["not_reached"])]
    failed = [f"- {row['case']}, {name}: {why}" for row in rows for name, why in row["failed"].items()]
    if failed:
        parts += ["## What the formula cannot compute", "\n".join(failed)]
    parts += ["<!-- --8<-- [end:tables] -->"]
    return "\n\n".join(parts) + "\n"


def summary(result: dict[str, Any]) -> str:
    """The README's table: some rows of the report."""
    chosen = {row["case"].removesuffix(" float32"): row for row in result["cases"]}
    lines = []
    for name in SUMMARY:
        row = chosen[name]
        time = milliseconds(row["providers"][ours(row)]["step"]).split(" ")[0]
        lines.append([name, time, _times(ratio(row, "eager")), _times(ratio(row, best_compile(row))), gain(row)])
    return table(["forward + backward, fp32", "ms", "eager", "torch.compile", "gain"], lines)


def lost_summary(result: dict[str, Any]) -> str:
    """The README's sentence on the rows that we lose."""
    rows = [line.replace(" of our time", "") for line in lost(result["cases"])]
    return f"Rows that we lose, as a share of our time: {'; '.join(rows)}." if rows else "No row is lost."


def step_summary(result: dict[str, Any]) -> str:
    """The README's other table: what a loss adds to a training step."""
    found = result["training_step"]
    rows = [[loss, f"{added['kdkernels']:+.1%}", f"{added['eager']:+.1%}"] for loss, added in found["added"].items()]
    return table([f"a training step of {found['median'] * 1e3:.0f} ms", "ours adds", "eager adds"], rows)


def training_table(found: dict[str, Any]) -> str:
    head = (
        f"Forward and backward of resnet8x4, batch 64, 32 x 32 images, cross entropy: {found['median'] * 1e3:.0f} ms; "
        "the teacher's outputs are there already. What each loss adds, the median of "
        f"{found['rounds']} rounds' differences:"
    )
    providers = ["kdkernels", "eager", "compile"]
    rows = [[loss, *(f"{added[p]:+.1%}" for p in providers)] for loss, added in found["added"].items()]
    return f"{head}\n\n{table(['loss', *providers], rows)}"


def write(result: dict[str, Any], base: Path) -> list[Path]:
    base.parent.mkdir(parents=True, exist_ok=True)
    files = {kind: base.with_name(f"{base.name}-{kind}.png") for kind in ("ratios", "roofline")}
    data, text = base.with_suffix(".json"), base.with_suffix(".md")
    data.write_text(json.dumps(result, indent=1) + "\n")
    text.write_text(markdown(result, [p.name for p in files.values()]))
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures without matplotlib: run benchmarks.render where there is one")
        return [data, text]
    from .pictures import draw

    draw(result, files)
    return [data, text, *files.values()]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        source = Path(argument)
        for made in write(json.loads(source.read_text()), source.with_suffix("")):
            print(made)
