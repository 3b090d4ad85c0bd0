"""Pictures: a run's curves, a comparison's, and the demo's beside its table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.figure import Figure

from .statistics import Difference

if TYPE_CHECKING:
    from .compare import Entry
    from .demo import Result
    from .loop import History


def plot_run(name: str, history: History, path: Path) -> None:
    """Loss and accuracies against the step."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, unit, columns in (
        (left, "loss", ("loss", "test_loss")),
        (right, "accuracy, %", ("train_accuracy", "test_accuracy")),
    ):
        for column in columns:
            if points := [(row["step"], row[column]) for row in history if column in row]:
                axes.plot(*zip(*points, strict=True), label=column.replace("_", " "), marker="." * (len(points) == 1))
        axes.set(xlabel="step", ylabel=unit)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.suptitle(name, fontsize="medium")
    figure.savefig(path, format="png", dpi=110)


def plot_comparison(
    entries: Sequence[Entry], differences: Sequence[Difference | None], taught: float | None, path: Path
) -> None:
    """Mean test accuracy against the step, and each difference to the student alone with two standard errors."""
    figure = Figure(figsize=(12, max(4.0, 1.2 + 0.26 * len(entries))), layout="constrained")
    curves, points = figure.subplots(1, 2, width_ratios=(5, 4))
    colours = colormaps["tab20"]
    for i, (entry, difference) in enumerate(zip(entries, differences, strict=True)):
        steps, means = _mean_curve(list(entry.histories.values()))
        curves.plot(steps, means, color=colours(i % 20), linewidth=1.5, marker="." * (len(steps) == 1))
        mean, error = (0.0, 0.0) if difference is None else difference
        points.errorbar(mean, i, xerr=2 * error, fmt="o", color=colours(i % 20), capsize=2)
    curves.set(xlabel="step", ylabel="test accuracy, %", title="mean over the seeds")
    if taught is not None:
        curves.axhline(taught, color="black", linestyle="--", linewidth=1, label=f"teacher, {taught:.1f} %")
        curves.legend(frameon=False, loc="lower right")
    points.set(xlabel="points against the best student alone, ± 2 standard errors")
    points.set_yticks(range(len(entries)), [f"{entry.name}  lr {entry.lr:g}" for entry in entries])
    points.invert_yaxis()
    points.axvline(0, color="grey", linewidth=0.8)
    for axes in (curves, points):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=110)


def _mean_curve(histories: Sequence[History]) -> tuple[list[float], list[float]]:
    tested = [[row for row in history if "test_accuracy" in row] for history in histories]
    steps = [row["step"] for row in tested[0]]
    return steps, [statistics.mean(row["test_accuracy"] for row in rows) for rows in zip(*tested, strict=True)]


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
