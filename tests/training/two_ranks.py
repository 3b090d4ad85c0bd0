"""What the two processes of test_two_ranks.py do: count what the losses send, then compare methods together."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from forks import be_rank, start_ranks
from torch import Tensor

from kdkernels import MLKDLoss, cc_loss, cli, irg_loss, pkt_loss, rkd_loss, sp_loss
from kdkernels.training.methods import NKD
from kdkernels.training.traffic import VIEWS, Job

# two ranks, whose number divides neither width
JOBS = [Job(3, 2, (9, 2, 2), (5, 3, 1)), Job(5, 2, (7, 1, 3), (11, 2, 2), 2)]
DTYPES = {4: torch.float32, 2: torch.bfloat16}


def losses(job: Job) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    pooled = {"rkd": rkd_loss, "pkt": pkt_loss, "cc": cc_loss, "irg": irg_loss}
    world = dist.group.WORLD
    heads = MLKDLoss(job.student[0], job.teacher[0], group=world)
    target = torch.arange(job.batch) % 3

    def mlkd(s: Tensor, t: Tensor) -> Tensor:
        s, t = (x.mean((2, 3)).float().repeat_interleave(VIEWS, 0) for x in (s, t))
        return heads(s, t, target)

    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        name: lambda s, t, loss=loss: loss(s.mean((2, 3)), t.mean((2, 3)), group=world) for name, loss in pooled.items()
    }
    return found | {"sp": lambda s, t: sp_loss(s, t, group=world), "mlkd": mlkd}


def counted(loss: Callable[[Tensor, Tensor], Tensor], job: Job) -> list[tuple[str, int]]:
    """The collectives of a forward and backward pass, with the bytes that this rank hands to each."""
    calls: list[tuple[str, int]] = []

    def counting(name: str, sent: int) -> Any:
        real = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append((name.removesuffix("_single"), args[sent].nbytes))
            return real(*args, **options)

        return mock.patch.object(dist, name, call)

    s, t = (torch.randn(job.batch, *shape).to(DTYPES[job.size]) for shape in (job.student, job.teacher))
    with counting("all_reduce", 0), counting("all_gather", 1), counting("all_to_all_single", 1):
        loss(s.requires_grad_(), t).backward()
    return sorted(calls)


def work(rank: int, folder: str, command: list[str]) -> None:
    be_rank(rank, 2, folder)
    calls = [{name: counted(loss, job) for name, loss in losses(job).items()} for job in JOBS]
    Path(folder, f"calls-{rank}.json").write_text(json.dumps(calls))
    if rank:  # a method whose loss is not a number here alone: the other process must not wait for this one
        patch = mock.patch.object(NKD, "terms", lambda *args: {"ce": args[1].logits.sum() * float("nan")})
        patch.start()
    with Path(folder, f"out-{rank}.txt").open("w") as file:
        sys.stdout = file
        sys.exit(cli.main(command))  # which leaves by itself


def launch(folder: Path, command: list[str]) -> None:
    start_ranks(work, (str(folder), command))
