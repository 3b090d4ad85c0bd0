"""Survivors that no test can kill, and why: equivalent.txt.

A paragraph there is a reason, behind "#", and lines as a survivor is printed: ``path: line => line``, or
``path: line => *`` for every change to that line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .changes import ROOT, mutants

FILE = Path(__file__).with_name("equivalent.txt")


class Entry(NamedTuple):
    change: str
    reason: str

    def covers(self, name: str) -> bool:
        """The name of a mutant, or of any change to the same line."""
        return self.change == name or (self.change.endswith(" => *") and name.startswith(self.change[:-1]))


def read() -> list[Entry]:
    entries = []
    for paragraph in FILE.read_text().split("\n\n"):
        lines = paragraph.strip().splitlines()
        reason = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
        changes = [line for line in lines if not line.startswith("#")]
        if changes and not reason:
            raise ValueError(f"no reason is given for {changes[0]}")
        entries += [Entry(change, reason) for change in changes]
    return entries


def reason(name: str, entries: Sequence[Entry]) -> str:
    return next((entry.reason for entry in entries if entry.covers(name)), "")


def stale(entries: Sequence[Entry]) -> list[str]:
    """Entries that are of no mutant any more."""
    paths = {entry.change.partition(": ")[0] for entry in entries}
    names = {path: [m.name for m in mutants(ROOT / path)] if (ROOT / path).exists() else [] for path in paths}
    return [e.change for e in entries if not any(map(e.covers, names[e.change.partition(": ")[0]]))]
