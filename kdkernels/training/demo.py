"""The demo: a teacher, the student alone and the student with each method, on digits, over several seeds."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from torch.utils.data import TensorDataset

from . import data, runs
from .distillation import Distillation
from .loop import History, fit
from .methods import AMD, CORSD, KD, MLKD, SP, STKD, Alone, Method, Outputs
from .models import ConvNet, small_student, small_teacher
from .plots import plot_demo
from .stages import stage_names
from .statistics import Difference, mean_and_deviation, paired
from .taps import FeatureTaps

LABELLED = 10  # per class: few, so that a teacher has something to add
LR = 0.4  # of 0.02 .. 0.4 the best for the student alone; the methods get the same
TEACHER_EPOCHS, STUDENT_EPOCHS = 26, 100  # 400 steps of 64 images, 300 of 32

# Weights for a run of 300 steps: the papers' are made for 240 epochs of CIFAR.
# They are made anew for each run: some have heads for one student.
DEMO_METHODS: dict[str, tuple[str, Callable[[], Method]]] = {
    "alone": ("CE", Alone),
    "mixup": ("CE on mixup images", partial(Alone, alpha=1.0)),
    "kd": ("0.1 CE + 0.9 KD", KD),
    "sp": ("CE + 300 SP", partial(SP, weight=300)),
    "stkd": ("0.1 CE + 0.9 KD, mixup", STKD),
    "amd": ("0.1 CE + 0.9 KD + 0.2 AMD", AMD),
    "mlkd": ("CE + 0.1 MLKD", partial(MLKD, correlation_weight=5.0, supervised_weight=0.1, alignment_weight=2.0)),
    "corsd": ("CE + CORSD, no teacher", CORSD),
}


class Result(NamedTuple):
    name: str
    what: str
    accuracies: list[float]
    histories: list[History]
    loss_ms: float


def run_demo(
    output: str | Path = "runs/demo", seeds: int = 3, console: Console | None = None, overwrite: bool = False
) -> list[Result]:
    """Train everything, print the table, write metrics and ``demo.png`` to ``output``."""
    console = console or Console()
    start = time.perf_counter()
    folder = Path(output)
    train = partial(_train, overwrite=overwrite)
    runs.check_free(folder / "teacher", overwrite)  # the first of its runs
    split = data.digits()
    logging.getLogger("accelerate").setLevel(logging.ERROR)

    set_seed(0)
    teacher = small_teacher(split.channels, split.classes)
    history = train(
        Alone(), None, teacher, split.train, split.test, folder / "teacher", epochs=TEACHER_EPOCHS, batch=64, lr=0.05
    )
    accuracy = history[-1]["test_accuracy"]
    console.print(f"teacher: {_size(teacher)} parameters, {len(split.train)} images, {accuracy:.1f} %")

    results, losses = _students(split, teacher, folder, seeds, train, console)
    times = loss_times(losses)
    results = [result._replace(loss_ms=times[result.name]) for result in results]
    rows = _rows(results)
    size = _size(small_student(split.channels, split.classes))
    table = Table(title=f"Digits: {LABELLED} labelled images per class, {seeds} seeds, a student of {size} parameters")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    picture = plot_demo(results, accuracy, HEADINGS, rows, folder / "demo.png")
    console.print(f"{time.perf_counter() - start:.0f} s; curves and table in {picture}")
    return results


def _students(
    split: data.Split, teacher: ConvNet, folder: Path, seeds: int, train: Callable[..., History], console: Console
) -> tuple[list[Result], dict[str, Callable[[], None]]]:
    """A student of each method and seed, and the methods' losses, to be timed."""
    results, losses = [], {}
    for name, (what, make) in DEMO_METHODS.items():
        histories = []
        for seed in range(seeds):
            set_seed(seed)
            student, method = small_student(split.channels, split.classes), make()
            subset = data.labelled_subset(split.train, LABELLED, seed)
            own_teacher, where = teacher if method.needs_teacher else None, folder / f"{name}-{seed}"
            options: dict[str, Any] = {"epochs": STUDENT_EPOCHS, "batch": 32, "lr": LR, "seed": seed}
            histories.append(train(method, own_teacher, student, subset, split.test, where, **options))
        losses[name] = loss_of(method, teacher, student, subset, batch=32)
        results.append(Result(name, what, [history[-1]["test_accuracy"] for history in histories], histories, 0.0))
        console.print(f"{name}: {', '.join(f'{a:.1f}' for a in results[-1].accuracies)} %")
    return results, losses


def _train(
    method: Method,
    teacher: ConvNet | None,
    student: ConvNet,
    train: TensorDataset,
    test: TensorDataset,
    output: Path,
    *,
    epochs: int,
    batch: int,
    lr: float,
    seed: int = 0,
    overwrite: bool = False,
) -> History:
    distillation = Distillation(teacher, student, method)
    if method.triplets:
        epochs = round(epochs / 3)  # each epoch shows three times the images
    loaders = data.loader(train, batch, train=True, triplets=method.triplets), data.loader(test, 1000, train=False)
    # a demo is not resumed, and no checkpoints are needed
    where: dict[str, Any] = {"output": output, "overwrite": overwrite, "save_every": epochs, "trackers": ()}
    history = fit(distillation, *loaders, epochs=epochs, lr=lr, seed=seed, eval_every=5, **where)
    distillation.close()
    return history


def loss_times(losses: Mapping[str, Callable[[], None]], rounds: int = 50) -> dict[str, float]:
    """Milliseconds of each loss: the median over rounds in which all of them take turns.

    So what a loss runs after is the same for all, and a disturbance meets all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, run in losses.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(each[rounds // 10 :]) for name, each in times.items()}  # the first ones warm up


def loss_of(
    method: Method, teacher: ConvNet, student: ConvNet, dataset: TensorDataset, batch: int
) -> Callable[[], None]:
    """The loss's own forward and backward pass of one batch, without the networks."""
    images = next(iter(data.loader(dataset, batch, train=True, triplets=method.triplets)))
    prepared = method.prepare(*images)

    def run(model: ConvNet) -> Outputs:
        names = stage_names(model)
        with FeatureTaps(model, names if method.stages == "all" else names[-1:]) as taps:
            logits = model(prepared.images).detach().requires_grad_()
            return Outputs(logits, [x.detach().requires_grad_() for x in taps.pop()])

    outputs = run(student), run(teacher)
    return lambda: torch.stack(list(method.terms(*outputs, prepared).values())).sum().backward()


def _size(model: ConvNet) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1000:.1f} k"


def gain(result: Result, alone: Result) -> Difference:
    """The difference to the student alone over the same seeds."""
    difference = paired(dict(enumerate(result.accuracies)), dict(enumerate(alone.accuracies)))
    assert difference is not None
    return difference


HEADINGS = ("method", "loss", "test accuracy, %", "against alone", "loss, ms/step")


def _rows(results: list[Result]) -> list[list[str]]:
    rows = []
    for result in results:
        accuracy = mean_and_deviation(result.accuracies)
        against = "" if result is results[0] else str(gain(result, results[0]))
        rows.append([result.name, result.what, accuracy, against, f"{result.loss_ms:.2f}"])
    return rows
