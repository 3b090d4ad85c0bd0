"""The training loop, on Hugging Face Accelerate, which handles devices, precision, processes and accumulation."""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ..ops.checks import check_positive
from . import runs
from .checks import FIRST_STEPS, check_batch, check_finite, check_optimizer, name_what_drowns
from .defaults import default_optimizer, default_scheduler
from .distillation import Distillation, DistillationOutput, eval_mode
from .exact import exact_step
from .methods import Method
from .outputs import Output, read
from .triplets import triplet_loader

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
    overwrite: bool = False,
    seed: int = 0,
    eval_every: int = 1,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> History:
    """Train ``distillation.student`` and return one row of metrics per epoch.

    Args:
        distillation: what is trained: its student, and the method's own heads.
        train_loader, test_loader: batches of (images, labels) tensors. For "corsd" triplets are made from
            ``train_loader.dataset``, a third as many in a batch as it has images; a loader that makes them itself is
            taken as it is (see ``training.triplets``). Accelerate distributes the batches over processes.
        epochs, lr: passes over the training data, and the default optimizer's highest learning rate.
        optimizer: over ``distillation.parameters()``; default: SGD with ``lr``. Either way the learning rate warms up
            to the optimizer's own over 5 % of the steps and then follows a cosine to zero.
        accumulate: micro-batches per optimizer step. A relational method (sp, mlkd) sees them as one batch, which costs
            a second forward pass.
        mixed_precision: "no", "fp16" or "bf16".
        accelerator: your own; its settings replace ``accumulate`` and ``mixed_precision``.
        output: a folder for metrics.csv, best.safetensors (by test accuracy) and last.safetensors (the student), each
            written whole or not at all, after every epoch.
        overwrite: replace the run that ``output`` holds; without it that is an error.
        seed: for the order of the data and for mixing; the models are already made.
        eval_every: epochs between tests; the last epoch is always tested.

    Returns:
        Rows with epoch, step, lr, loss, every term, train_accuracy, seconds, and test_accuracy after a test.
        Accuracies are in percent. For mixed images train_accuracy is against the first label; mlkd and corsd have none,
        as their rows do not match the labels.

    Raises:
        ValueError: epochs, eval_every or accumulate below 1, a learning rate that is not positive and finite, a loader
            without batches, an optimizer that misses the method's heads.
        TypeError: a loader without len(), or whose batches are not (images, labels).
        FileExistsError: ``output`` holds a run already.
        FloatingPointError: a step whose loss is not finite. The weights are those before it.
        OSError: a file cannot be written. What was saved before is there.

    Over several processes a relational method sees the batch of all processes, and a printed line says so. A term that
    exceeds the others by far in the first steps is logged once, with the option that scales it.
    """
    _check(epochs=epochs, eval_every=eval_every, accumulate=accumulate)
    check_positive(lr=lr)
    for name, loader in (("train_loader", train_loader), ("test_loader", test_loader)):
        if loader is not None and not _length(name, loader):
            raise ValueError(f"{name} has no batches")
    if optimizer is not None:
        check_optimizer(distillation, optimizer)
    if output is not None:
        runs.check_free(Path(output), overwrite)
    if distillation.method.triplets:
        train_loader = triplet_loader(train_loader)
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
        runs.claim(folder, overwrite)  # where that is impossible it fails before the training
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
            row |= _train_epoch(distillation, model, train_loader, optimizer, scheduler, accelerator, epoch, epochs)
            if test_loader is not None and (epoch % eval_every == 0 or epoch == epochs):
                row["test_accuracy"] = evaluate(distillation.student, test_loader, accelerator, distillation.output)
            history.append(row)
            if folder is not None:
                runs.save(folder, distillation.student, history, row.get("test_accuracy", -1.0) > best)
            best = max(best, row.get("test_accuracy", best))
            bar.update(task, advance=1)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return history


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")


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
    epoch: int,
    epochs: int,
) -> dict[str, float]:
    model.train()
    start = time.perf_counter()
    sums: defaultdict[str, float] = defaultdict(float)
    share = accelerator.gradient_accumulation_steps
    together = share if distillation.method.relational else 1
    rest = len(loader) % share  # batches in the last window, if it is not a whole one
    results = 0
    first: list[dict[str, float]] = []
    steps = math.ceil(len(loader) / share)
    for group in _groups(loader, together):
        batch = results * together
        step = (epoch - 1) * steps + batch // share
        distillation.schedule(step / (epochs * steps))
        where = f"step {step + 1} (epoch {epoch}, batch {batch + 1} of {len(loader)})"
        if together > 1:
            result = _exact_backward(distillation, group, accelerator)
            values = _values(result, group, where)
            accelerator.gradient_state._set_sync_gradients(True)  # else what accumulate() left decides on the step
            _step(optimizer, scheduler, accelerator)
        else:
            with accelerator.accumulate(model):
                result = model(*group[0])
                window = rest if results >= len(loader) - rest else share
                accelerator.backward(result.loss * (share / window))  # which divides by share
                values = _values(result, group, where)
                _step(optimizer, scheduler, accelerator)
        results += 1
        for name, value in values.items():
            sums[name] += value
        if epoch == 1 and len(first) < FIRST_STEPS:
            first.append({name: values[name] for name in result.terms})
            if len(first) == min(FIRST_STEPS, math.ceil(len(loader) / together)) and accelerator.is_main_process:
                name_what_drowns(distillation.method, first)
    means = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device) / results, "mean").tolist()
    return dict(zip(sums, means, strict=True)) | {"seconds": time.perf_counter() - start}


def _values(result: DistillationOutput, group: list[tuple[Tensor, ...]], where: str) -> dict[str, float]:
    """Loss, terms and accuracy of a step as numbers; it is between backward pass and update, where waiting is cheap."""
    measured = {"loss": result.loss.detach(), **result.terms}
    target = torch.cat([batch[1] for batch in group])
    if len(result.logits) == len(target):
        measured["train_accuracy"] = 100 * (result.logits.argmax(-1) == target).float().mean()
    values = dict(zip(measured, torch.stack([x.float() for x in measured.values()]).tolist(), strict=True))
    check_finite(values, where)
    return values


def _groups(loader: Loader, size: int) -> Iterator[list[tuple[Tensor, ...]]]:
    batches = iter(loader)
    while group := list(islice(batches, size)):
        for batch in group:
            check_batch(batch, "train_loader")
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
def evaluate(
    model: nn.Module, loader: Loader, accelerator: Accelerator | None = None, output: Output | None = None
) -> float:
    """Accuracy in percent, in eval mode; the mode of every submodule is restored."""
    # none is made here: a new one would reset the accumulation of those there are
    device = accelerator.device if accelerator else next(model.parameters(), torch.empty(0)).device
    correct, total = 0, 0
    with eval_mode(model):
        for batch in loader:
            check_batch(batch, "test_loader")
            images, target = batch
            with accelerator.autocast() if accelerator else nullcontext():
                logits, _ = read(model(images.to(device)), output, "model")
                hits = logits.argmax(-1) == target.to(device)
            if accelerator:
                hits = accelerator.gather_for_metrics(hits)
            correct, total = correct + int(hits.sum()), total + len(hits)
    if not total:
        raise ValueError("evaluate: the loader has no images")
    return 100 * correct / total
