"""One epoch of optimizer steps."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor

from .checks import FIRST_STEPS, check_batch, check_finite, name_what_drowns
from .distillation import DistillationOutput
from .evaluation import Loader
from .exact import exact_step
from .state import Training

Micro = tuple[Tensor, ...]


def train_epoch(training: Training, epoch: int) -> dict[str, float]:
    """The means of loss, terms and accuracy over the epoch, and its seconds."""
    start = time.perf_counter()
    loader, accelerator = training.train_loader, training.accelerator
    method, steps = training.distillation.method, training.steps_per_epoch
    training.model.train()
    sums: defaultdict[str, float] = defaultdict(float)
    share = accelerator.gradient_accumulation_steps
    together = share if method.relational else 1
    results = 0
    first = math.ceil(method.warmup * training.epochs * steps)  # the first step with all terms at their weights
    for group in _groups(loader, together):
        batch = results * together
        step = (epoch - 1) * steps + batch // share
        training.distillation.schedule(step / (training.epochs * steps))
        where = f"step {step + 1} (epoch {epoch}, batch {batch + 1} of {len(loader)})"
        result, values = (_exact if together > 1 else _plain)(training, group, batch, where)
        results += 1
        for name, value in values.items():
            sums[name] += value
        if first <= step < first + FIRST_STEPS and not training.named and accelerator.is_main_process:
            training.named = name_what_drowns(method, step + 1, {name: values[name] for name in result.terms})
        if accelerator.sync_gradients:
            for callback in training.callbacks:
                callback.on_step(training, step + 1, values)
    means = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device) / results, "mean").tolist()
    return dict(zip(sums, means, strict=True)) | {"seconds": time.perf_counter() - start}


def _groups(loader: Loader, size: int) -> Iterator[list[Micro]]:
    batches = iter(loader)
    while group := list(islice(batches, size)):
        for batch in group:
            check_batch(batch, "train_loader")
        yield group


def _plain(
    training: Training, group: list[Micro], batch: int, where: str
) -> tuple[DistillationOutput, dict[str, float]]:
    """A micro-batch by itself."""
    accelerator, batches = training.accelerator, len(training.train_loader)
    share = accelerator.gradient_accumulation_steps
    rest = batches % share  # batches in the last window, if it is not a whole one
    with accelerator.accumulate(training.model):
        result = training.model(*group[0])
        window = rest if batch >= batches - rest else share
        accelerator.backward(result.loss * (share / window))  # which divides by share
        values = _values(accelerator, result, group, where)
        _step(training)
    return result, values


def _exact(
    training: Training, group: list[Micro], batch: int, where: str
) -> tuple[DistillationOutput, dict[str, float]]:
    """All micro-batches of a step as one batch."""
    accelerator, distillation = training.accelerator, training.distillation
    share = accelerator.gradient_accumulation_steps  # accelerator.backward divides by it; this loss is whole already
    result = exact_step(distillation, group, lambda loss: accelerator.backward(loss * share), accelerator.autocast)
    if accelerator.num_processes > 1:  # the wrapper that averages gradients was not asked
        for parameter in distillation.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
    values = _values(accelerator, result, group, where)
    accelerator.gradient_state._set_sync_gradients(True)  # else what accumulate() left decides on the step
    _step(training)
    return result, values


def _values(accelerator: Accelerator, result: DistillationOutput, group: list[Micro], where: str) -> dict[str, float]:
    """Loss, terms and accuracy of a step as numbers; it is between backward pass and update, where waiting is cheap."""
    measured = {"loss": result.loss.detach(), **result.terms}
    target = torch.cat([batch[1] for batch in group])
    if len(result.logits) == len(target):
        measured["train_accuracy"] = 100 * (result.logits.argmax(-1) == target).float().mean()
    values = dict(zip(measured, torch.stack([x.float() for x in measured.values()]).tolist(), strict=True))
    finite = all(map(math.isfinite, values.values()))
    if accelerator.num_processes > 1:  # all of them stop, as the others would wait for one that does
        everywhere = accelerator.reduce(torch.tensor(float(finite), device=accelerator.device), "mean").item() == 1
        if finite and not everywhere:
            raise FloatingPointError(f"the loss is not finite at {where} in another process")
    check_finite(values, where)
    return values


def _step(training: Training) -> None:
    accelerator = training.accelerator
    if accelerator.sync_gradients and training.clip_norm is not None:
        accelerator.clip_grad_norm_(training.distillation.parameters(), training.clip_norm)
    training.optimizer.step()
    training.optimizer.zero_grad()
    if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
        training.scheduler.step()
        if training.ema is not None:
            training.ema.update()
