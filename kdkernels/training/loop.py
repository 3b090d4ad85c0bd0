"""The training loop, on Hugging Face Accelerate, which handles devices, precision, processes and accumulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import Progress
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..ops.checks import check_positive
from . import sharding
from . import trackers as tracking
from .averaging import EMA
from .callbacks import Callback
from .checks import check_optimizer
from .defaults import default_optimizer, default_scheduler
from .distillation import Distillation
from .evaluation import Loader, measure
from .output_cache import with_outputs
from .saving import Saving
from .state import Training
from .steps import train_epoch
from .taps import unwrap
from .trackers import make_accelerator
from .triplets import triplet_loader

History = list[dict[str, float]]
Scheduler = LRScheduler | Callable[[torch.optim.Optimizer, int], LRScheduler]


def fit(
    distillation: Distillation,
    train_loader: Loader,
    test_loader: Loader | None = None,
    *,
    epochs: int,
    lr: float = 0.05,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Scheduler | None = None,
    clip_norm: float | None = None,
    ema: float | None = None,
    accumulate: int = 1,
    mixed_precision: str = "no",
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    save_every: int = 1,
    callbacks: Sequence[Callback] = (),
    teacher_cache: str | Path | None = None,
    trackers: tracking.Trackers | None = None,
    seed: int = 0,
    eval_every: int = 1,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> History:
    """Train ``distillation.student`` and return one row of metrics per epoch; all options: docs/training.md, "fit".

    Args:
        train_loader, test_loader: batches of (images, labels). "corsd" gets triplets of ``train_loader.dataset``.
        lr, optimizer: over ``distillation.parameters()``; default: SGD with that highest learning rate.
        scheduler: a function (optimizer, steps) that makes it, or one over ``optimizer``; default: warm-up and cosine.
        clip_norm, ema: the largest norm of a step's gradient; the decay of averaged weights, which are then the ones
            that are tested, saved and at the end in the student.
        accumulate, mixed_precision: micro-batches per step, one batch to a relational method; "no", "fp16", "bf16".
        output, save_every: a folder for metrics, best and last student and checkpoints; epochs between two of them.
        overwrite, resume: what to do with a run in that folder, else an error. A resumed run ends bitwise as if it had
            never stopped, on the same machine; where there is nothing to resume it begins.
        teacher_cache: a folder for the teacher's outputs of every image, if these are the same in every epoch: written
            where they are not there yet, and read instead of running the teacher.
        trackers: names for Accelerate, or its trackers; None is TensorBoard where it is installed, () nothing.
        accelerator: your own; its settings replace ``accumulate``, ``mixed_precision`` and ``trackers``.

    Raises:
        ValueError: numbers out of range, loaders without batches, an optimizer that misses the method's heads, a run to
            resume that had other settings or has no whole checkpoint.
        TypeError: a loader without len(), or whose batches are not (images, labels).
        FileExistsError, OSError: ``output`` holds a run already; a file cannot be written (what was saved is there).
        FloatingPointError: a step whose loss is not finite. The weights are those before it.
    """
    check_positive(lr=lr, clip_norm=1.0 if clip_norm is None else clip_norm)
    _check(
        train_loader, test_loader, epochs=epochs, eval_every=eval_every, accumulate=accumulate, save_every=save_every
    )
    saving = Saving(None if output is None else Path(output), overwrite, resume, save_every)
    optimizer = optimizer or _optimizer(distillation, lr, scheduler)
    check_optimizer(distillation, optimizer)
    accelerator = accelerator or make_accelerator(mixed_precision, accumulate, trackers, saving.folder)
    sharding.check(accelerator, distillation, saves=output is not None)
    if teacher_cache is not None:
        train_loader = with_outputs(distillation, train_loader, Path(teacher_cache), accelerator)
    training = _prepare(distillation, optimizer, scheduler, train_loader, test_loader, accelerator, epochs, seed)
    training.clip_norm, training.callbacks = clip_norm, callbacks
    training.ema = None if ema is None else EMA(unwrap(distillation.student), ema)
    return _run(training, saving, eval_every, progress)


def _check(train_loader: Loader, test_loader: Loader | None, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    for name, loader in (("train_loader", train_loader), ("test_loader", test_loader)):
        if loader is not None and not _length(name, loader):
            raise ValueError(f"{name} has no batches")


def _length(name: str, loader: Loader) -> int:
    try:
        return len(loader)
    except TypeError as error:
        raise TypeError(f"{name} must have a length, for the learning rate and accumulation: {error}") from None


def _optimizer(distillation: Distillation, lr: float, scheduler: Scheduler | None) -> torch.optim.Optimizer:
    if isinstance(scheduler, LRScheduler):
        raise ValueError("a scheduler belongs to an optimizer: give that too, or a function (optimizer, steps)")
    return default_optimizer(distillation.parameters(), lr)


def _scheduler(scheduler: Scheduler | None, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    if scheduler is None:
        return default_scheduler(optimizer, steps)
    if not isinstance(scheduler, LRScheduler):
        scheduler = scheduler(optimizer, steps)
    if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
        raise ValueError(f"scheduler must be stepped after each step, without a metric, got {type(scheduler).__name__}")
    if scheduler.optimizer is not optimizer:
        raise ValueError("the scheduler is of another optimizer than the one that is given")
    return scheduler


def _prepare(
    distillation: Distillation,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None,
    train_loader: Loader,
    test_loader: Loader | None,
    accelerator: Accelerator,
    epochs: int,
    seed: int,
) -> Training:
    method = distillation.method
    if method.triplets:
        train_loader = triplet_loader(train_loader)
    set_seed(seed)
    model, wrapped, train_loader = accelerator.prepare(distillation, optimizer, train_loader)
    sharding.register(distillation)
    if test_loader is not None:
        test_loader = accelerator.prepare(test_loader)
    if not len(train_loader):
        raise ValueError(f"train_loader has too few batches for {accelerator.num_processes} processes")
    steps = math.ceil(len(train_loader) / accelerator.gradient_accumulation_steps)
    scheduler = _scheduler(scheduler, wrapped.optimizer, epochs * steps)
    training = Training(
        distillation, model, wrapped, scheduler, accelerator, train_loader, test_loader, epochs, steps, seed
    )
    if accelerator.num_processes > 1:
        method.group = dist.group.WORLD
        if method.relational:
            accelerator.print(
                f"{training.name}: rows are compared over the batches of all {accelerator.num_processes} processes"
            )
    return training


def _run(training: Training, saving: Saving, eval_every: int, progress: bool) -> History:
    accelerator, epochs = training.accelerator, training.epochs
    accelerator.step = 0  # an interrupted run may have left an accumulation window half done
    training.optimizer.zero_grad()
    saving.begin(training)
    tracking.start(accelerator, training.settings())
    show = progress and accelerator.is_main_process and Console().is_terminal
    try:
        with Progress(disable=not show, transient=True) as bar:
            task = bar.add_task(training.name, total=epochs, completed=len(training.history))
            for epoch in range(len(training.history) + 1, epochs + 1):
                if training.stop:
                    break
                row = _epoch(training, epoch, eval_every)
                training.history.append(row)
                for callback in training.callbacks:
                    callback.on_epoch(training, row)
                accelerator.log(row, step=int(row["step"]))
                saving.epoch(training)
                bar.update(task, advance=1)
    finally:
        tracking.finish(accelerator)
    accelerator.unwrap_model(training.model, keep_fp32_wrapper=False)
    if training.ema is not None:
        training.ema.apply()
    return training.history


def _epoch(training: Training, epoch: int, eval_every: int) -> dict[str, Any]:
    """Train an epoch and test after it."""
    row = {
        "epoch": epoch,
        "step": epoch * training.steps_per_epoch,
        "lr": training.optimizer.param_groups[0]["lr"],
        **train_epoch(training, epoch),
    }
    if training.test_loader is not None and (epoch % eval_every == 0 or epoch == training.epochs):
        distillation = training.distillation
        with training.averaged():
            tested = measure(
                distillation.student, training.test_loader, training.accelerator, predict=distillation.predict
            )
        row |= {f"test_{name}": value for name, value in tested.items()}
    return row
