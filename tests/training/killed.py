"""Trainings that are killed, resumed, and must end bitwise as one that was not.

``python killed.py FOLDER DEATHS METHOD...``   one run of each method that dies so many times: for test_resume.py
``python killed.py FOLDER DEATHS``             of each method so many runs that die at a counted moment, and as many
                                               that die at any time: ``make killed``

Each that is to die is a child of its own, forked from this process, which has one thread alone. A counted moment is an
optimizer step, a file that is written but has not its name yet, or one that has just got it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from states import unlike
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

from kdkernels.training import Callback, Distillation, fit, runs
from kdkernels.training.methods import METHODS
from kdkernels.training.models import ConvNet

OPTIONS: dict[str, dict[str, Any]] = {
    "kd": {"ema": 0.9, "clip_norm": 0.5, "scheduler": lambda optimizer, steps: OneCycleLR(optimizer, 0.1, steps)},
    "sp": {"accumulate": 2},
    "mlkd": {"save_every": 2},
    "corsd": {},
}


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images that take from all sources of randomness."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.images = torch.arange(24 * 64.0).sin().view(24, 1, 8, 8)
        self.targets = [i % 4 for i in range(24)]

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        noise = random.random() + np.random.rand() + torch.rand(()) + torch.rand((), generator=self.generator)  # noqa: NPY002
        return self.images[i] + 0.1 * noise, self.targets[i]


class Killer(Callback):
    """Dies at a moment; ``moments`` counts them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.moments, self.fsync = at, 0, os.fsync
        os.fsync = self.sync  # nothing here needs the disk itself

    def sync(self, descriptor: int) -> None:
        self.moment()

    def on_step(self, *_: object) -> None:
        self.moment()

    def moment(self) -> None:
        self.moments += 1
        if self.moments == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(method: str, folder: Path, at: int | None = None) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    teacher, student = (ConvNet(1, 4, widths) for widths in ((4, 6, 8), (3, 4, 5)))
    student.fc = nn.Sequential(nn.Dropout(0.2), student.fc) if method == "kd" else student.fc
    module = Distillation(teacher if METHODS[method].needs_teacher else None, student, method)
    optimizer = torch.optim.AdamW(module.parameters(), 0.01) if method == "kd" else None
    loader = DataLoader(Augmented(), 6, shuffle=True)
    killer = Killer(at)
    common = {"epochs": 4, "output": folder, "resume": True, "callbacks": [killer], "progress": False}
    fit(module, loader, DataLoader(Augmented(), 12), optimizer=optimizer, **common, **OPTIONS[method])
    os.fsync = killer.fsync
    (folder / "moments.txt").write_text(str(killer.moments))


def child(*arguments: Any, seconds: float | None = None) -> int:
    """The signal that ended it, or 0; after ``seconds`` it is killed."""
    pid = os.fork()
    if not pid:
        try:
            train(*arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        sys.exit(1)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def one_run(folder: Path, deaths: int, methods: list[str]) -> None:
    draw = random.Random(0)
    for method in methods:
        train(method, folder / method / "whole")
        moments = int((folder / method / "whole" / "moments.txt").read_text())
        died = 0
        for _ in range(deaths):
            died += child(method, folder / method / "killed", draw.randint(1, moments // 2)) == signal.SIGKILL
        child(method, folder / method / "killed")
        print(method, died)


def many_runs(folder: Path, deaths: int) -> None:
    draw = random.Random()
    for method in OPTIONS:
        whole = folder / method / "whole"
        assert not child(method, whole)
        begin = time.perf_counter()
        assert not child(method, folder / method / "again")
        assert not unlike(whole, folder / method / "again")
        seconds, moments = time.perf_counter() - begin, int((whole / "moments.txt").read_text())
        for kind, n in ((kind, n) for kind in ("moment", "time") for n in range(deaths)):
            killed, died = folder / method / f"{kind}-{n}", 0
            while died != signal.SIGKILL:  # by the clock one may have come to its end before
                shutil.rmtree(killed, ignore_errors=True)
                if kind == "moment":
                    died = child(method, killed, draw.randint(1, moments))
                else:
                    died = child(method, killed, seconds=draw.uniform(0, seconds))
            epochs = runs.saved(killed).rpartition("epoch ")[2] if (killed / runs.METRICS).is_file() else "0"
            assert not child(method, killed)
            if found := unlike(whole, killed):
                sys.exit(f"{method}, killed at a {kind} with {epochs} epochs saved, ends otherwise: {found[:5]}")
            print(
                f"{method}: killed at a {kind} with {epochs} of 4 epochs saved, resumed, bitwise the same", flush=True
            )


if __name__ == "__main__":
    if methods := sys.argv[3:]:
        one_run(Path(sys.argv[1]), int(sys.argv[2]), methods)
    else:
        many_runs(Path(sys.argv[1]), int(sys.argv[2]))
