"""What a loss adds to a training step: forward and backward of resnet8x4, CIFAR-sized images, batch 64."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels
from kdkernels.training import FeatureTaps
from kdkernels.training.models import BasicBlock, ConvBlock, ConvNet

from . import published
from .bench_gram import RESNET8X4
from .cases import DEVICE, Loss, layerwise, over_layers
from .timing import CUDA, Timed, quantile, take_turns

BATCH, CLASSES = 64, 100


class ResNet8x4(nn.Sequential):
    """A stem of 32 channels and one basic block in each of three stages (RepDistiller's resnet8x4)."""

    def __init__(self) -> None:
        super().__init__(ConvBlock(3, 32, 1), ConvNet(32, CLASSES, (64, 128, 256), BasicBlock))


def losses() -> dict[str, tuple[Loss, Loss]]:
    """Ours and the published one, of logits and the maps of three stages: (logits, maps..., teacher's) -> scalar."""

    def on_logits(loss: Loss) -> Loss:
        return lambda student, teacher, *_: loss(student[0], teacher[0])

    def on_maps(loss: Loss, last: bool) -> Loss:
        return lambda student, teacher, *_: loss(
            *(student[3:] if last else student[1:]), *(teacher[3:] if last else teacher[1:])
        )

    target, other = (torch.randint(CLASSES, (BATCH,), device=DEVICE) for _ in range(2))
    lam = torch.tensor(0.3, device=DEVICE)

    def stkd(loss: Loss) -> Loss:
        return lambda s, t: loss(s, t, target, other, lam)

    return {
        "kd": (on_logits(kdkernels.kd_loss), on_logits(published.kd)),
        "stkd": (on_logits(stkd(kdkernels.stkd_loss)), on_logits(stkd(published.stkd))),
        "sp, last stage": (on_maps(kdkernels.sp_loss, True), on_maps(published.sp, True)),
        "sp, 3 stages": (on_maps(layerwise(kdkernels.sp_loss, 3), False), on_maps(over_layers(published.sp, 3), False)),
        "amd, 3 stages": (
            on_maps(layerwise(kdkernels.amd_loss, 3), False),
            on_maps(over_layers(published.amd, 3), False),
        ),
        "mlkd correlation": (_pooled(kdkernels.correlation_loss), _pooled(published.correlation)),
    }


def _pooled(loss: Loss) -> Loss:
    return lambda student, teacher, *_: loss(student[3].mean((2, 3)), teacher[3].mean((2, 3)))


def steps() -> dict[str, Timed]:
    """One step without a loss, and one with each loss on each provider. The teacher's outputs are there already: they
    cost the same for every loss."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    torch.manual_seed(0)
    student = ResNet8x4().to(DEVICE)
    taps = FeatureTaps(student, [f"1.stages.{i}" for i in range(3)])
    images = torch.randn(BATCH, 3, 32, 32, device=DEVICE, generator=generator)
    target = torch.randint(CLASSES, (BATCH,), device=DEVICE, generator=generator)
    teacher = [torch.randn(BATCH, CLASSES, device=DEVICE, generator=generator)]
    teacher += [torch.randn(shape, device=DEVICE, generator=generator).relu() for shape in RESNET8X4]

    def step(loss: Callable[[list[Tensor], list[Tensor]], Tensor] | None) -> Timed:
        def run() -> dict[str, float]:
            student.zero_grad(set_to_none=True)
            start = _now()
            logits = student(images)
            outputs = [logits, *taps.pop()]
            total = F.cross_entropy(logits, target)
            if loss is not None:
                total = total + loss(outputs, teacher).reshape(())
            total.backward()
            return {"step": _now() - start}

        return run

    found = {"without": step(None)}
    for name, (ours, theirs) in losses().items():
        found[f"{name} | kdkernels"] = step(ours)
        found[f"{name} | eager"] = step(theirs)
        found[f"{name} | compile"] = step(torch.compile(theirs, dynamic=False))
    return found


def _now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def training_step(seconds: float = 60.0) -> dict[str, Any]:
    """Median seconds of the step without a loss, and the share of it that each loss adds: the median over rounds of the
    difference to the same round's step without one."""
    torch._dynamo.reset()
    times = {name: t["step"] for name, t in take_turns(steps(), seconds, 7).items()}
    bare = times.pop("without")
    median = quantile(bare, 0.5)
    added: dict[str, dict[str, float]] = {}
    for name, values in times.items():
        loss, provider = name.split(" | ")
        added.setdefault(loss, {})[provider] = (
            quantile([v - b for v, b in zip(values, bare, strict=True)], 0.5) / median
        )
    return {"median": median, "rounds": len(bare), "added": added}


@pytest.mark.parametrize(
    "name", ["without", *(f"{n} | {p}" for n in losses() for p in ("kdkernels", "eager", "compile"))]
)
def test_training_step(benchmark: Any, name: str) -> None:
    benchmark.group = "training step"
    benchmark.pedantic(steps()[name], rounds=5, warmup_rounds=1)
