"""The demo's picture: learning curves beside the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .demo import Result


def plot_demo(
    results: Sequence[Result], teacher: float, headings: Sequence[str], rows: Sequence[Sequence[str]], path: Path
) -> Path:
    """Mean test accuracy over the seeds against the step, its range shaded, the teacher's, and the table's rows."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    curves, beside = figure.subplots(1, 2, width_ratios=(5, 6))
    colours = []
    for result in results:
        tested = [[row for row in history if "test_accuracy" in row] for history in result.histories]
        steps = [row["step"] for row in tested[0]]
        by_step = list(zip(*([row["test_accuracy"] for row in seed] for seed in tested), strict=True))
        (line,) = curves.plot(steps, [statistics.mean(a) for a in by_step], label=result.name, linewidth=1.8)
        colours.append(line.get_color())
        curves.fill_between(
            steps, [min(a) for a in by_step], [max(a) for a in by_step], color=colours[-1], alpha=0.12, linewidth=0
        )
    curves.axhline(teacher, color="black", linestyle="--", linewidth=1.2, label=f"teacher, {teacher:.1f} %")
    curves.set(xlabel="step", ylabel="test accuracy, %", title="mean and range over the seeds", ylim=(60, 100))
    curves.legend(frameon=False, loc="lower right")
    curves.grid(alpha=0.3)
    beside.axis("off")
    table = beside.table([list(row) for row in rows], colLabels=list(headings), loc="center", cellLoc="left", edges="B")
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    table.auto_set_column_width(list(range(len(headings))))
    table.scale(1, 1.9)
    for i, colour in enumerate(colours, start=1):
        table[i, 0].get_text().set(color=colour, weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
