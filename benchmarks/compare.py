"""This tree's kernels beside another commit's: both run these benchmarks, in processes that take turns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .render import geomean, table

ROOT = Path(__file__).parents[1]
TURNS = 3


def compare(revision: str, only: str, seconds: float) -> str:
    """A table of our backends' steps here and at ``revision``, medians over the turns."""
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(other), revision], cwd=ROOT, check=True)
        try:
            shutil.rmtree(other / "benchmarks", ignore_errors=True)
            shutil.copytree(ROOT / "benchmarks", other / "benchmarks")
            found: dict[str, list[dict[str, Any]]] = {"here": [], "base": []}
            for turn in range(TURNS):
                for name, tree in (("here", ROOT), ("base", other)):
                    print(f"turn {turn + 1} of {TURNS}: {name}", file=sys.stderr)
                    found[name].append(_run(tree, only, seconds / TURNS, Path(folder) / "out.json"))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)
    return _table(revision, *(_medians(runs) for runs in found.values()))


def _run(tree: Path, only: str, seconds: float, output: Path) -> dict[str, Any]:
    options = ["--only", only, "--seconds", str(seconds), "--json", str(output), "--providers", "native,triton"]
    command = [sys.executable, "-m", "benchmarks.report", *options]
    environment = {**os.environ, "PYTHONPATH": str(tree)}  # before an installed kdkernels
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    return dict(json.loads(output.read_text()))


def _medians(runs: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Milliseconds of a step by case and backend."""
    times: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for row in run["cases"]:
            for name, provider in row["providers"].items():
                times.setdefault((row["case"], name), []).append(provider["step"][0] * 1e3)
    return {key: sorted(values)[len(values) // 2] for key, values in times.items()}


def _table(revision: str, here: dict[tuple[str, str], float], base: dict[tuple[str, str], float]) -> str:
    rows = [
        [case, name, f"{time:.3f}", f"{base[case, name]:.3f}", f"{base[case, name] / time:.2f}"]
        for (case, name), time in here.items()
        if (case, name) in base
    ]
    mean = geomean(float(row[-1]) for row in rows)
    head = ["case", "backend", "here, ms", f"{revision}, ms", "ratio"]
    return f"{table(head, rows)}\n\nGeometric mean {mean:.2f}: above 1, this tree is faster."
