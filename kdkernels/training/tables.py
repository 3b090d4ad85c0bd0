"""The table of a comparison: Markdown, CSV, JSON and curves."""

from __future__ import annotations

import argparse
import csv
import io
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plots, record, runs
from .statistics import Difference, deviation, mean_and_deviation, paired

if TYPE_CHECKING:
    from .compare import Entry

HEADINGS = ("method", "lr", "images seen", "seeds", "test accuracy, %", "against alone", "against kd", "s/run")


class Table:
    """What the entries' runs say so far."""

    def __init__(self, args: argparse.Namespace, entries: list[Entry], taught: float | None) -> None:
        self.args, self.entries, self.taught = args, entries, taught
        self.versions = record.versions(args)

    def best(self, method: str) -> Entry | None:
        """The best learning rate (and options) of a method by itself."""
        runs_of = [e for e in self.entries if [name for name, _ in e.spelling.parts] == [method] and e.histories]
        return max(runs_of, key=lambda e: statistics.mean(e.accuracies.values()), default=None)

    def against(self, entry: Entry, method: str) -> Difference | None:
        """The paired difference to the best of a method; none of that one itself."""
        base = self.best(method)
        return None if base is None or base is entry else paired(entry.accuracies, base.accuracies)

    def rows(self) -> list[dict[str, Any]]:
        return [self._row(entry) for entry in self.entries]

    def _row(self, entry: Entry) -> dict[str, Any]:
        values = list(entry.accuracies.values())
        row: dict[str, Any] = {"method": entry.name, "lr": entry.lr, "epochs": entry.epochs}
        row |= {"images": entry.images, "seeds": len(values)}
        row |= {"mean": statistics.mean(values), "deviation": deviation(values)} if values else {}
        for method in ("alone", "kd"):
            if difference := self.against(entry, method):
                row |= {f"against_{method}": difference.mean, f"against_{method}_error": difference.error}
        if difference := self.against(entry, "alone"):
            row["better_by_two_errors"] = difference.clear
        row |= {"seconds": entry.seconds} if values else {}
        row |= {f"seed_{seed}": value for seed, value in sorted(entry.accuracies.items())}
        row |= {"failed": _failure(entry)} if entry.failures else {}
        return {name: value for name, value in row.items() if value == value}  # not what one seed has no value of

    def text(self) -> str:
        """The Markdown table, its columns aligned."""
        lines = [list(HEADINGS), *(self._cells(entry) for entry in self.entries)]
        if self.best("kd") is None:
            lines = [[cell for i, cell in enumerate(line) if HEADINGS[i] != "against kd"] for line in lines]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        padded = [" | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
        rule = " | ".join("-" * w for w in widths)
        table = [f"| {line} |" for line in [padded[0], rule, *padded[1:]]]
        failed = [f"- {e.name} at {e.lr:g} {_failure(e)}" for e in self.entries if e.failures]
        return "\n".join([*table, "", *failed] if failed else table)

    def _cells(self, entry: Entry) -> list[str]:
        values = list(entry.accuracies.values())
        alone, kd = (self.against(entry, method) for method in ("alone", "kd"))
        against = "(the best)" if entry is self.best("alone") else "" if alone is None else str(alone)
        accuracy = mean_and_deviation(values) if values else ""
        if entry.failures:
            accuracy = f"{accuracy}, " * bool(values) + f"{len(entry.failures)} failed"
        return [
            entry.name,
            f"{entry.lr:g}",
            f"{entry.images:,}".replace(",", " "),
            str(len(values)),
            accuracy,
            f"**{against}**" if alone is not None and alone.clear else against,
            "" if kd is None else str(kd),
            f"{entry.seconds:.1f}" if values else "",
        ]

    def write(self) -> None:
        folder: Path = self.args.output
        markdown, rows = self.markdown(), self.rows()
        runs.write_whole(folder / "results.md", lambda path: path.write_text(markdown))
        runs.write_whole(folder / "results.csv", lambda path: path.write_text(_csv(rows)))
        record.write_json(
            folder / "results.json",
            {
                "settings": record.settings(self.args),
                "versions": self.versions,
                "teacher": self.taught,
                "rows": rows,
            },
        )

    def markdown(self) -> str:
        args = self.args
        taught = "" if self.taught is None else f" ({self.taught:.1f} %)"
        few = f", {args.per_class} labelled images per class" if args.per_class else ""
        return (
            f"# {args.data}: {args.model}, taught by {args.teacher_model}{taught}\n\n    {args.line}\n\n"
            f"{args.epochs} epochs of batches of {args.batch_size}{few}, seeds {', '.join(map(str, args.seeds))}. Test "
            "accuracy after the last epoch: mean and standard deviation over the seeds, and mean differences, paired "
            "by seed, with their standard errors. Alone and kd are those of their rows that are best here, on the test "
            "images. Images seen are those of a run, each view that a method makes of one counted. In bold: better "
            "than the student alone by more than two standard errors.\n\n"
            f"{self.text()}\n"
        )

    def draw(self) -> None:
        drawn = [entry for entry in self.entries if entry.histories]
        if drawn:
            alone = [self.against(entry, "alone") for entry in drawn]
            path = self.args.output / "curves.png"
            runs.write_whole(path, lambda part: plots.plot_comparison(drawn, alone, self.taught, part))


def _failure(entry: Entry) -> str:
    seeds = ", ".join(map(str, sorted(entry.failures)))
    return f"failed with seed {seeds}: {next(iter(entry.failures.values()))}"


def _csv(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
