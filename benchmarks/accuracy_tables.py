"""The tables of docs/numbers.md: written between two marks of the page, and read back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "numbers.md"
START, END = "<!-- tables of benchmarks.accuracy -->", "<!-- end of the tables -->"
COLUMNS = ("one ulp", "native", "triton", "reference")
MARGIN, LEAST = 1.5, 1e-7  # another processor rounds other sums
Found = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]  # by state, loss and column: of loss and gradient
Table = dict[str, dict[str, tuple[float, float]]]


def bound(error: float) -> str:
    """The error with its margin, rounded up to one digit."""
    if not math.isfinite(error):
        return str(error)
    error = max(MARGIN * error, LEAST)
    digit = 10.0 ** math.floor(math.log10(error))
    return f"{math.ceil(error / digit - 1e-9) * digit:.0e}".replace("e-0", "e-").replace("e+0", "e+")


def render(found: Found) -> str:
    parts = []
    for title, losses in found.items():
        lines = [f"### {title}", "", f"| loss | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for loss, errors in losses.items():
            cells = [", ".join(bound(e) for e in errors[c]) if c in errors else "" for c in COLUMNS]
            lines.append(f"| {loss} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def write(page: Path, found: Found) -> None:
    before, _, after = re.split(f"({re.escape(START)}.*{re.escape(END)})", page.read_text(), flags=re.S)
    page.write_text(f"{before}{START}\n\n{render(found)}\n\n{END}{after}")


def read(page: Path) -> dict[str, Table]:
    """The page's figures, by state, loss and column."""
    tables: dict[str, Table] = {}
    text = page.read_text().split(START)[1].split(END)[0]
    for part in text.split("### ")[1:]:
        title, *lines = part.strip().splitlines()
        tables[title] = {}
        for line in lines[3:]:
            loss, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
            pairs = zip(COLUMNS, cells, strict=False)
            tables[title][loss] = {c: _pair(cell) for c, cell in pairs if cell}
    return tables


def _pair(cell: str) -> tuple[float, float]:
    loss, gradient = (float(x) for x in cell.split(","))
    return loss, gradient
