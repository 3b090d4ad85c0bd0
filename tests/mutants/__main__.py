"""Try mutants: every survivor is in equivalent.txt, with the reason why it is none, or this fails.

PYTHONPATH=tests python -m mutants [--count 100] [--seed 0] [--all] [word in the path or the change ...]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from . import equivalent
from .changes import Mutant, mutants
from .matters import Run, files, run
from .trial import Verdict, check_baseline, judge, prepare

WORKERS = 2


def chosen(count: int, seed: int, words: Sequence[str]) -> list[Mutant]:
    """A sample: half of it from csrc/, half from Python."""
    every = [m for path in files() for m in mutants(path) if all(word in m.name for word in words)]
    halves = [[m for m in every if m.path.startswith("csrc/") == native] for native in (True, False)]
    ranked = (sorted(half, key=lambda m: m.rank(seed))[: -(-count // 2)] for half in halves)
    return [m for half in ranked for m in half]


def _together(runs: Iterable[Run]) -> list[Run]:
    """The runs with the tests of all that are otherwise alike."""
    tests: dict[Run, set[str]] = {}
    for each in runs:
        tests.setdefault(each._replace(tests=()), set()).update(each.tests)
    return [alike._replace(tests=tuple(sorted(them))) for alike, them in tests.items()]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mutants")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="every mutant, some hours")
    parser.add_argument("words", nargs="*")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin = time.monotonic()
    sample = chosen(1 << 30 if given.all else given.count, given.seed, given.words)
    entries = equivalent.read()
    prepare()
    counts: Counter[str] = Counter()
    # fork: a trial forks again from a process that has imported torch, and has no threads
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        pool.map(check_baseline, _together({run(m.path) for m in sample}), chunksize=1)
        for verdict in pool.imap_unordered(judge, sample, chunksize=1):
            result = _print(verdict, entries)
            counts[result] += 1
    minutes = (time.monotonic() - begin) / 60
    said = ", ".join(f"{n} {result}" for result, n in counts.most_common())
    print(f"{len(sample)} mutants, seed {given.seed}, {minutes:.0f} min: {said}")
    stale = equivalent.stale(entries)
    for entry in stale:
        print(f"STALE  equivalent.txt: no such change any more: {entry}")
    return int(counts["SURVIVED"] > 0 or bool(stale))


def _print(verdict: Verdict, entries: Sequence[equivalent.Entry]) -> str:
    result = verdict.result
    if result == "survived":
        reason = equivalent.reason(verdict.name, entries)
        result = "equivalent" if reason else "SURVIVED"
        verdict = verdict._replace(by=reason)
    if result == "SURVIVED" or os.environ.get("VERBOSE"):
        print(f"{result}  {verdict.name}  {verdict.by}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
