"""A report's pictures: what the published formulas take of our time, and how near the steps come to the roof."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from .render import TITLES, best_compile, ours, ratio, roof, step


def draw(result: dict[str, Any], files: dict[str, Path]) -> None:
    """``files``: where the pictures "ratios" and "roofline" go."""
    sizes = {"ratios": (9, 1.5 + 0.24 * len(result["cases"])), "roofline": (8, 5)}
    for kind, painter in (("ratios", ratios), ("roofline", roofline)):
        figure, axes = plt.subplots(figsize=sizes[kind])
        painter(axes, result)
        figure.savefig(files[kind], dpi=110, bbox_inches="tight")  # whatever the labels need
        plt.close(figure)


def ratios(axes: Any, result: dict[str, Any]) -> None:
    """Bars: how many times our time the published formula takes."""
    rows = result["cases"]
    for offset, color, label, pick in (
        (-0.2, "#9aa5b1", "eager", lambda r: "eager"),
        (0.2, "#2f6f9f", "torch.compile, the better mode", best_compile),
    ):
        values = [ratio(row, pick(row)) or math.nan for row in rows]
        axes.barh([i + offset for i in range(len(rows))], values, 0.38, color=color, label=label)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 3, 5, 10, 20, 50]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [row["case"].removesuffix(" float32") for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(
        "time of the published formula / time of kdkernels, forward + backward\n(right of 1: ours is faster)"
    )
    axes.set_title(result["machine"]["device"])
    axes.legend(loc="upper right", fontsize=8)


def roofline(axes: Any, result: dict[str, Any]) -> None:
    """How near each step comes to the roof, which is 1."""
    machine = result["machine"]
    for group, marker in zip(TITLES, "osP^vDX", strict=True):
        rows = [row for row in result["cases"] if row["group"] == group]
        for name, color, alpha in (
            ("kdkernels", "#2f6f9f", 1.0),
            ("compile", "#e08e45", 0.7),
            ("eager", "#9aa5b1", 0.7),
        ):
            points = []
            for row in rows:
                provider = {"kdkernels": ours(row), "compile": best_compile(row), "eager": "eager"}[name]
                if provider in row["providers"]:
                    points.append((row["bytes"] / 1e6, roof(row, machine) / step(row, provider)))
            if points:
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, c=color, alpha=alpha, marker=marker, s=28, label=f"{group}, {name}")
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes that forward and backward have to move, MB")
    axes.set_ylabel("the roof's time / the step's time")
    axes.set_title(f"{machine['device']}: the roof is the copy bandwidth, or the matmul rate where it allows less")
    axes.legend(fontsize=6, ncol=2, loc="lower right")
