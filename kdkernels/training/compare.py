"""``kdkernels compare``: methods x seeds in one process, each finished run kept, and a table of what is there."""

from __future__ import annotations

import argparse
import csv
import logging
import re
import shutil
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn

from . import record, runs, tables
from .callbacks import Callback
from .checkpoints import found
from .distillation import Distillation
from .evaluation import Loader
from .loop import History, fit
from .methods import METHODS
from .methods.spelling import Spelling, parse
from .output_cache import NoSpaceError, key, refusal
from .progress import Bar, a_bar
from .setting import TEACHER, Setting

POINTS = 20  # of a curve: a test and a checkpoint for each
FREE = (
    "methods",
    "lr",
    "lrs",
    "seeds",
    "workers",
    "teacher_cache",
)  # what may differ from one call to the next in one folder
ALL = "all"
OUTPUTS = "teacher-outputs"  # the folder of the teacher's outputs

logger = logging.getLogger("kdkernels")


@dataclass
class Entry:
    """A row of the table: a method at a learning rate, its runs by seed, and why some failed."""

    spelling: Spelling
    lr: float
    epochs: int
    images: int = 0  # that the student sees in a run
    histories: dict[int, History] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.spelling.text.partition("@")[0]

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.,+=-]", "_", self.name.replace(":", ",")) + f"@{self.lr:g}"

    @property
    def accuracies(self) -> dict[int, float]:
        return {seed: history[-1]["test_accuracy"] for seed, history in self.histories.items()}

    @property
    def seconds(self) -> float:
        """Of training, for a run."""
        return statistics.mean(sum(row["seconds"] for row in history) for history in self.histories.values())


def entries_of(args: argparse.Namespace) -> list[Entry]:
    """The methods that were asked for, each once, behind the student alone at each of its learning rates."""
    texts = [text for text in args.methods if text != ALL]
    if ALL in args.methods:
        texts = [*METHODS, *texts]
    alone = [f"alone@{lr:g}" for lr in args.lrs or [args.lr]]
    entries = []
    for text in [*alone, *texts]:
        if args.lrs and text == "alone":
            continue  # its learning rates are these
        spelling = parse(text)
        # an epoch of triplets shows each image three times
        epochs = max(1, round(args.epochs / 3)) if spelling.method().triplets else args.epochs
        entries.append(Entry(spelling, spelling.lr or args.lr, epochs))
    return list({entry.folder: entry for entry in entries}.values())


def compare(args: argparse.Namespace) -> int:
    """Make the runs that are not there yet; write and print the table. 1 if there is no run at all, else 0."""
    entries = entries_of(args)
    teaching = next((e.spelling for e in entries if e.spelling.method().needs_teacher), None)
    setting = Setting(args)
    main = not setting.console.quiet
    if main:
        _claim(args)
    teacher = setting.rehearse(parse("alone" if teaching is None else "kd"), 0)
    if main:
        record.write(args.output, args)
    taught: float | None = None
    if teacher is not None and args.teacher is None:
        teacher, history = setting.train_teacher(args.output / TEACHER, 0, resume=True)
        taught = history[-1]["test_accuracy"]
    elif teacher is not None:
        taught = setting.accuracy(teacher)
    for entry in entries:
        entry.images = entry.epochs * setting.images_of(entry.spelling.method())
    table = tables.Table(args, entries, taught)
    _Runs(setting, teacher, table).make()
    if main:
        setting.console.print("\n" + table.text(), soft_wrap=True, markup=False, highlight=False)
        setting.console.print(f"\ntable, curves and runs in {args.output}", soft_wrap=True)
    return 0 if any(entry.histories for entry in entries) else 1


def _claim(args: argparse.Namespace) -> None:
    """Take the folder, for the first time or again with the same settings."""
    folder, asked = args.output, record.settings(args)
    there = record.read(folder)
    if "methods" not in there:  # no comparison
        runs.check_free(folder, overwrite=False)
        return
    if args.overwrite:
        for part in (folder / "runs", folder / TEACHER):
            for path in [*part.rglob(runs.METRICS), *part.rglob(runs.CHECKPOINTS)]:
                runs.claim(path.parent, overwrite=True)
        shutil.rmtree(folder / OUTPUTS, ignore_errors=True)
        return
    other = [f"{k} {there[k]!r} (asked: {v!r})" for k, v in asked.items() if k not in FREE and there.get(k, v) != v]
    if other:
        different = ", ".join(other)
        raise ValueError(f"{folder} holds a comparison with other settings: {different}; --overwrite replaces it")


class _Runs:
    """All runs, seed by seed, so that a comparison that is cut short has all methods with the first seeds."""

    def __init__(self, setting: Setting, teacher: nn.Module | None, table: tables.Table) -> None:
        self.setting, self.teacher, self.table = setting, teacher, table
        self.console, self.folder = setting.console, setting.args.output / "runs"
        self.todo = self._left()
        self.done, self.start = 0, time.monotonic()

    def _left(self) -> list[tuple[Entry, int]]:
        """The runs that are not finished; those that are get into the table."""
        read = {}
        for entry in self.table.entries:
            for seed in self.setting.args.seeds:
                history = _history(self._where(entry, seed))
                if history and history[-1]["epoch"] == entry.epochs:
                    read[entry.folder, seed] = history
        broadcast_object_list(shared := [read])  # the main process' disk is the one that counts
        for entry in self.table.entries:
            entry.histories = {seed: h for (name, seed), h in shared[0].items() if name == entry.folder}
        pairs = [(entry, seed) for seed in self.setting.args.seeds for entry in self.table.entries]
        return [(entry, seed) for entry, seed in pairs if seed not in entry.histories]

    def _where(self, entry: Entry, seed: int) -> Path:
        return self.folder / entry.folder / f"seed-{seed}"

    def make(self) -> None:
        kept = len(self.setting.args.seeds) * len(self.table.entries) - len(self.todo)
        if kept:
            self.console.print(f"{kept} runs are finished already, {len(self.todo)} are to be made")
        level = logger.level
        try:
            with a_bar(self.console) as bar:
                for entry, seed in self.todo:
                    if seed != self.setting.args.seeds[0]:
                        logger.setLevel(logging.ERROR)  # what is said of a method is said once
                    task = bar.add_task(f"{entry.name} seed {seed}", total=entry.epochs)
                    self._one(entry, seed, [Bar(bar, task)])
                    bar.remove_task(task)
        finally:
            logger.setLevel(level)
            if not self.console.quiet:
                self.table.write()
                self.table.draw()

    def _one(self, entry: Entry, seed: int, callbacks: Sequence[Callback]) -> None:
        where = self._where(entry, seed)
        failure = ""
        try:
            entry.histories[seed] = self._train(entry, seed, where, callbacks)
        except OSError:
            raise  # the disk's, which the next run would meet as well
        except Exception as error:
            failure = _reason(error)
            if not self.console.quiet:
                where.mkdir(parents=True, exist_ok=True)
                (where / "error.txt").write_text(traceback.format_exc())
        failure = next(filter(None, gather_object([failure])), "")  # one process's failure is everybody's
        if failure:
            entry.failures[seed] = failure
            entry.histories.pop(seed, None)
        self.done += 1
        if not self.console.quiet:
            self._tell(entry, seed, where)
            self.table.write()

    def _train(self, entry: Entry, seed: int, where: Path, callbacks: Sequence[Callback]) -> History:
        setting, args = self.setting, self.setting.args
        set_seed(seed)
        student, method = setting.student(), entry.spelling.method()
        teacher = self.teacher if method.needs_teacher else None
        distillation = setting.distillation(teacher, student, method, **entry.spelling.pairs)
        every, train_loader = max(1, entry.epochs // POINTS), setting.train_loader(method, seed)
        run = partial(
            fit,
            distillation,
            train_loader,
            setting.test_loader(),
            epochs=entry.epochs,
            lr=entry.lr,
            accumulate=args.accumulate,
            mixed_precision=args.mixed_precision,
            output=where,
            resume=True,
            eval_every=every,
            save_every=every,
            callbacks=callbacks,
            trackers=(),
            progress=False,
            seed=seed,
        )
        try:
            return run(teacher_cache=self._cache(distillation, train_loader, seed))
        except NoSpaceError as error:
            logger.warning("%s; the teacher runs in every epoch instead", error)
            return run()
        finally:
            distillation.close()

    def _cache(self, distillation: Distillation, train_loader: Loader, seed: int) -> Path | None:
        """Where the teacher's outputs are kept, if they are to be and are the same in every epoch."""
        args = self.setting.args
        wanted = {"yes": True, "no": False}.get(args.teacher_cache, torch.accelerator.current_accelerator() is None)
        if not wanted or refusal(distillation, train_loader):
            return None
        of = f"-{seed}" if args.per_class else ""  # each seed has images of its own
        return args.output / OUTPUTS / f"{key(distillation)}{of}"

    def _tell(self, entry: Entry, seed: int, where: Path) -> None:
        """A line for a run, and how long the rest will take."""
        if seed in entry.histories:
            for path in found(where):
                path.unlink()  # it will not be resumed
            seconds = sum(row["seconds"] for row in entry.histories[seed])
            what = f"{entry.accuracies[seed]:.1f} % ({seconds:.0f} s)"
        else:
            what = f"failed: {entry.failures[seed]}"
        left = (time.monotonic() - self.start) / self.done * (len(self.todo) - self.done)
        more = f"; about {_duration(left)} to go" if self.done < len(self.todo) else ""
        self.console.print(
            f"[{self.done}/{len(self.todo)}] {entry.name} lr {entry.lr:g} seed {seed}: {what}{more}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    told = isinstance(error, (ValueError, TypeError, FloatingPointError))
    return lines[0] if lines and told else f"{type(error).__name__}: {lines[0] if lines else ''}"


def _history(folder: Path) -> History:
    """The metrics of a run; none where there are none."""
    path = folder / runs.METRICS
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
