"""The training loop, on Hugging Face Accelerate, which handles devices, precision, processes and accumulation."""

from __future__ import annotations

import csv
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from .defaults import default_optimizer, default_scheduler
from .distillation import Distillation, DistillationOutput, eval_mode
from .exact import exact_step
from .methods import Method
from .taps import unwrap

Loader = DataLoader[tuple[Tensor, ...]]
History = list[dict[str, float]]


def make_accelerator(mixed_precision: str, accumulate: int) -> Accelerator:
    AcceleratorState._reset_state()  # else it refuses another precision than the first one in this process
    # without cpu=True, Accelerate makes of several CPU processes several trainings of one process each
    cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate)


def fit(
    distillation: Distillation,
    train_loader: Loader,
    test_loader: Loader | None = None,
    *,
    epochs: int,
    lr: float = 0.05,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    mixed_precision: str = "no",
    output: str | Path | None = None,
    seed: int = 0,
    eval_every: int = 1,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> History:
    """Train ``distillation.student`` and return one row of metrics per epoch.

    Args:
        distillation: what is trained: its student, and the method's own heads.
        train_loader, test_loader: batches of (images, labels) tensors; in training for "corsd" (images, labels,
            negatives' labels). Accelerate distributes them over processes.
        epochs, lr: passes over the training data, and the default optimizer's highest learning rate.
        optimizer: over ``distillation.parameters()``; default: SGD with ``lr``. Either way the learning rate warms up
            to the optimizer's own over 5 % of the steps and then follows a cosine to zero.
        accumulate: micro-batches per optimizer step. A relational method (sp, mlkd) sees them as one batch, which costs
            a second forward pass.
        mixed_precision: "no", "fp16" or "bf16".
        accelerator: your own; its settings replace ``accumulate`` and ``mixed_precision``.
        output: a folder for metrics.csv, best.safetensors (by test accuracy) and last.safetensors (the student).
        seed: for the order of the data and for mixing; the models are already made.
        eval_every: epochs between tests; the last epoch is always tested.

    Returns:
        Rows with epoch, step, lr, loss, every term, train_accuracy, seconds, and test_accuracy after a test.
        Accuracies are in percent. For mixed images train_accuracy is against the first label; mlkd and corsd have none,
        as their rows do not match the labels.

    Raises:
        ValueError: epochs, eval_every or accumulate below 1, or a loader without batches.
        TypeError: a loader without len().
        FloatingPointError: an epoch whose loss is not finite.

    Over several processes a relational method sees the batch of all processes, and a printed line says so.
    """
    for name, value in (("epochs", epochs), ("eval_every", eval_every), ("accumulate", accumulate)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    for name, loader in (("train_loader", train_loader), ("test_loader", test_loader)):
        if loader is not None and not _length(name, loader):
            raise ValueError(f"{name} has no batches")
    accelerator = accelerator or make_accelerator(mixed_precision, accumulate)
    set_seed(seed)
    optimizer = optimizer or default_optimizer(distillation.parameters(), lr)
    model, optimizer, train_loader = accelerator.prepare(distillation, optimizer, train_loader)
    if test_loader is not None:
        test_loader = accelerator.prepare(test_loader)
    if not len(train_loader):
        raise ValueError(f"train_loader has too few batches for {accelerator.num_processes} processes")
    steps_per_epoch = math.ceil(len(train_loader) / accelerator.gradient_accumulation_steps)
    scheduler = default_scheduler(optimizer, epochs * steps_per_epoch)
    method = distillation.method
    if method.relational and accelerator.num_processes > 1:
        method.group = dist.group.WORLD
        accelerator.print(
            f"{_name(method)}: rows are compared over the batches of all {accelerator.num_processes} processes"
        )
    accelerator.step = 0  # an interrupted run may have left an accumulation window half done
    optimizer.zero_grad()
    folder = Path(output) if output is not None and accelerator.is_main_process else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # where that is impossible it fails before the training
    history: History = []
    best = -1.0
    show = progress and accelerator.is_main_process and Console().is_terminal
    with Progress(disable=not show, transient=True) as bar:
        task = bar.add_task(_name(method), total=epochs)
        for epoch in range(1, epochs + 1):
            row: dict[str, float] = {
                "epoch": epoch,
                "step": epoch * steps_per_epoch,
                "lr": optimizer.param_groups[0]["lr"],
            }
            row |= _train_epoch(distillation, model, train_loader, optimizer, scheduler, accelerator)
            if test_loader is not None and (epoch % eval_every == 0 or epoch == epochs):
                row["test_accuracy"] = evaluate(distillation.student, test_loader, accelerator)
            history.append(row)
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss of epoch {epoch} is {row['loss']}: {row}")
            if folder is not None:
                _save(folder, distillation.student, history, row.get("test_accuracy", -1.0) > best)
            best = max(best, row.get("test_accuracy", best))
            bar.update(task, advance=1)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return history


def _length(name: str, loader: Loader) -> int:
    try:
        return len(loader)
    except TypeError as error:
        raise TypeError(f"{name} must have a length, for the learning rate and accumulation: {error}") from None


def _name(method: Method) -> str:
    return type(method).__name__.lower()


def _train_epoch(
    distillation: Distillation,
    model: nn.Module,
    loader: Loader,
    optimizer: Any,
    scheduler: LRScheduler,
    accelerator: Accelerator,
) -> dict[str, float]:
    model.train()
    start = time.perf_counter()
    sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
    share = accelerator.gradient_accumulation_steps
    together = share if distillation.method.relational else 1
    rest = len(loader) % share  # batches in the last window, if it is not a whole one
    results = 0
    for group in _groups(loader, together):
        if together > 1:
            result = _exact_backward(distillation, group, accelerator)
            accelerator.gradient_state._set_sync_gradients(True)  # else what accumulate() left decides on the step
            _step(optimizer, scheduler, accelerator)
        else:
            with accelerator.accumulate(model):
                result = model(*group[0])
                window = rest if results >= len(loader) - rest else share
                accelerator.backward(result.loss * (share / window))  # which divides by share
                _step(optimizer, scheduler, accelerator)
        results += 1
        sums["loss"] += result.loss.detach()
        for name, term in result.terms.items():
            sums[name] += term
        target = torch.cat([batch[1] for batch in group])
        if len(result.logits) == len(target):
            sums["train_accuracy"] += 100 * (result.logits.argmax(-1) == target).float().mean()
    means = accelerator.reduce(torch.stack(list(sums.values())) / results, "mean").tolist()
    return dict(zip(sums, means, strict=True)) | {"seconds": time.perf_counter() - start}


def _groups(loader: Loader, size: int) -> Iterator[list[tuple[Tensor, ...]]]:
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def _step(optimizer: Any, scheduler: LRScheduler, accelerator: Accelerator) -> None:
    optimizer.step()
    optimizer.zero_grad()
    if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
        scheduler.step()


def _exact_backward(
    distillation: Distillation, group: list[tuple[Tensor, ...]], accelerator: Accelerator
) -> DistillationOutput:
    share = accelerator.gradient_accumulation_steps  # accelerator.backward divides by it; this loss is whole already
    result = exact_step(distillation, group, lambda loss: accelerator.backward(loss * share), accelerator.autocast)
    if accelerator.num_processes > 1:  # the wrapper that averages gradients was not asked
        for parameter in distillation.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return result


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, accelerator: Accelerator | None = None) -> float:
    """Accuracy in percent, in eval mode; the mode of every submodule is restored."""
    # none is made here: a new one would reset the accumulation of those there are
    device = accelerator.device if accelerator else next(model.parameters(), torch.empty(0)).device
    correct, total = 0, 0
    with eval_mode(model):
        for images, target in loader:
            with accelerator.autocast() if accelerator else nullcontext():
                hits = model(images.to(device)).argmax(-1) == target.to(device)
            if accelerator:
                hits = accelerator.gather_for_metrics(hits)
            correct, total = correct + int(hits.sum()), total + len(hits)
    if not total:
        raise ValueError("evaluate: the loader has no images")
    return 100 * correct / total


def _save(folder: Path, student: nn.Module, history: History, best: bool) -> None:
    student = unwrap(student)  # the keys of the network itself, compiled or not
    save_model(student, str(folder / "last.safetensors"))
    if best:
        save_model(student, str(folder / "best.safetensors"))
    names = list(dict.fromkeys(name for row in history for name in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)
