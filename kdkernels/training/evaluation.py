"""How good a model is on a loader of labelled images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from .checks import check_batch
from .modes import eval_mode
from .outputs import Output, read

Loader = DataLoader[tuple[Tensor, ...]]


def evaluate(
    model: nn.Module, loader: Loader, accelerator: Accelerator | None = None, output: Output | None = None
) -> float:
    """Accuracy in percent, in eval mode; the mode of every submodule is restored."""
    return measure(model, loader, accelerator, output)["accuracy"]


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: Loader,
    accelerator: Accelerator | None = None,
    output: Output | None = None,
    predict: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """accuracy and, of more than five classes, top5 in percent, and loss: the mean cross entropy.

    ``predict`` makes the logits, by default from what the model returns.
    """
    # none is made here: a new one would reset the accumulation of those there are
    device = accelerator.device if accelerator else next(model.parameters(), torch.empty(0)).device
    sums, total = torch.zeros(3, dtype=torch.float64), 0
    classes = 0
    with eval_mode(model):
        for batch in loader:
            check_batch(batch, "test_loader")
            images, target = (x.to(device) for x in batch)
            with accelerator.autocast() if accelerator else nullcontext():
                logits = predict(images) if predict else read(model(images), output, "model")[0]
            rows = _rows(logits, target)
            if accelerator:
                rows = accelerator.gather_for_metrics(rows)
            sums, total, classes = sums + rows.cpu().double().sum(0), total + len(rows), logits.shape[1]
    if not total:
        raise ValueError("evaluate: the loader has no images")
    accuracy, top5, loss = (sums / total).tolist()
    measured = {"accuracy": 100 * accuracy, "top5": 100 * top5, "loss": loss}
    if classes <= 5:
        del measured["top5"]
    return measured


def _rows(logits: Tensor, target: Tensor) -> Tensor:
    """(N, 3): whether the label is the first, is among the first five, and its cross entropy."""
    first = logits.argmax(-1) == target
    five = (logits.topk(min(5, logits.shape[1]), dim=-1).indices == target[:, None]).any(1)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.stack([first, five, F.cross_entropy(logits.to(dtype), target, reduction="none")], 1)
