"""What the gloo processes of test_distributed.py run. Each leaves what it computed in a file, to be compared there."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forks import start_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kdkernels
from kdkernels import (
    cc_loss,
    correlation_loss,
    dist_loss,
    irg_loss,
    mlkd_loss,
    mlld_loss,
    pkt_loss,
    rkd_loss,
    sp_loss,
    supervised_contrastive_loss,
)
from kdkernels.ops import backend as backends
from kdkernels.ops.gram.op import Gram
from kdkernels.ops.softmax_kl.op import SoftmaxKL

UPSTREAM = 2.5
VIEWS = 3
IMAGES = {2: (3, 2), 4: (3, 0, 2, 4)}  # per rank; one rank of four has none
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Student(nn.Module):
    """Two layers whose widths, 11 and 15, no number of ranks here divides."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(6, 11, generator=generator, dtype=torch.float64).to(dtype))
        self.second = nn.Parameter(torch.randn(11, 15, generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x @ self.first).tanh()
        return y, (y @ self.second).relu().view(-1, 3, 1, 5)


def batch(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, teacher features and labels of the whole batch."""
    generator = torch.Generator().manual_seed(7)
    rows = VIEWS * sum(IMAGES[size])
    x, teacher = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (6, 15))
    labels = torch.randint(3, (rows // VIEWS,), generator=generator).repeat_interleave(VIEWS)
    return x.to(dtype), teacher.to(dtype), labels


def mine(x: Tensor, rank: int, size: int) -> Tensor:
    return x.split([VIEWS * n for n in IMAGES[size]])[rank]


def weighted(rows: Tensor) -> Tensor:
    """A sum to which every row adds with a weight of its own."""
    return (rows * torch.linspace(1, 2, len(rows), dtype=rows.dtype)).sum()


Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "sp": lambda f, t, y, **group: sp_loss(f, [t[:, :7], t.view(-1, 5, 3)], **group),
    "sp_layers": lambda f, t, y, **group: weighted(
        sp_loss(f, [t, t], layer_weights=[2.0, 0.5], layer_reduction="none", **group)
    ),
    "correlation_rows": lambda f, t, y, **group: weighted(
        correlation_loss(f[1].flatten(1), t[:, :7], views=VIEWS, reduction="none", **group)
    ),
    "supervised_rows": lambda f, t, y, **group: weighted(
        supervised_contrastive_loss(f[1].flatten(1), t, y, reduction="none", **group)
    ),
    "sp_l1_sum": lambda f, t, y, **group: sp_loss(f, [t, t], row_norm="l1", reduction="sum", **group),
    "correlation": lambda f, t, y, **group: correlation_loss(f[1].flatten(1), t[:, :7], views=VIEWS, **group),
    "correlation_one_view": lambda f, t, y, **group: correlation_loss(f[1].flatten(1), t[:, :7], views=1, **group),
    "rkd": lambda f, t, y, **group: rkd_loss(f[1], t[:, :7], **group),
    "irg": lambda f, t, y, **group: irg_loss(f[1], t[:, :7], reduction="sum", **group),
    "pkt": lambda f, t, y, **group: 1e3 * pkt_loss(f[1], t[:, :7], **group),
    "cc": lambda f, t, y, **group: cc_loss(f[1], t[:, :7], reduction="sum", **group),
    "supervised": lambda f, t, y, **group: supervised_contrastive_loss(f[1].flatten(1), t, y, **group),
    "mlkd": lambda f, t, y, **group: mlkd_loss(f[1].flatten(1), t, y, views=VIEWS, alignment_weight=0.0, **group),
    "dist": lambda f, t, y, **group: 10 * dist_loss(f[1].flatten(1), t, temperature=2.0, **group),
    "mlld": lambda f, t, y, **group: mlld_loss(f[1].flatten(1), t, f[1].flatten(1).flip(1), t.flip(1), **group),
}


def train_step(model: nn.Module, loss: Loss, data: tuple[Tensor, ...], **group: Any) -> tuple[Tensor, list[Tensor]]:
    value = loss(model(data[0]), *data[1:], **group)
    (UPSTREAM * value).backward()
    return value.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def raised(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def raised_within(function: Callable[[], Any]) -> tuple[str, float]:
    start = time.monotonic()
    return raised(function), time.monotonic() - start


def same_numbers(rank: int, size: int, world: dist.ProcessGroup) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for dtype in TOLERANCE:
        data = tuple(mine(x, rank, size) for x in batch(size, dtype))
        for name, loss in LOSSES.items():
            model = DistributedDataParallel(Student(dtype))
            out[f"{name} {dtype}"] = train_step(model, loss, data, group=world)

        # accumulation: two micro-batches of the rank's rows, gradients averaged once
        model = DistributedDataParallel(Student(dtype))
        halves = list(zip(*(x.split([VIEWS, x.shape[0] - VIEWS] if len(x) else [0, 0]) for x in data), strict=True))
        loss = kdkernels.cached_backward(
            lambda b, model=model: (*model(b[0]), *b[1:]),
            halves,
            lambda f, g, *rest: UPSTREAM * LOSSES["sp"]((f, g), *rest, group=world),
            modules=model,
            no_sync=model.no_sync,
        )
        out["buffers"] = buffers_after_two_steps(rank)
        out[f"accumulated {dtype}"] = loss / UPSTREAM, [p.grad for p in model.parameters()]
    return out


def buffers_after_two_steps(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """BatchNorm's statistics, which DistributedDataParallel takes from rank 0 at each step: ours and a plain loop's."""
    halves = [torch.randn(n, 6, generator=torch.Generator().manual_seed(rank)) + rank for n in (4, 5)]
    teacher = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    networks = [nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    ours, plain = (DistributedDataParallel(n) for n in networks)
    for _ in range(2):
        kdkernels.cached_backward(ours, halves, lambda f: sp_loss(f, teacher), no_sync=ours.no_sync)
        with plain.no_sync():
            plain(halves[0]).sum().backward()
        plain(halves[1]).sum().backward()
    return list(ours.buffers()), list(plain.buffers())


def half_leaves(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features whose Gram matrix is far over 65504."""
    generator = torch.Generator().manual_seed(5)
    shape = (VIEWS * sum(IMAGES[size]), 7, 3, 3)
    return tuple((300 * torch.rand(shape, generator=generator)).to(dtype) for _ in range(2))  # type: ignore[return-value]


HALF_LOSSES: dict[str, Loss] = {
    "sp": lambda s, t, **group: 1e3 * sp_loss(s, t, **group),
    "correlation": lambda s, t, **group: 1e3 * correlation_loss(s.flatten(1), t.flatten(1), views=VIEWS, **group),
}


# what one forward and backward pass over ranks calls of an implementation, and how often
CALLS: dict[str, dict[str, int]] = {
    "sp": {"gram.grams": 1, "gram.sp_from_grams": 1, "gram.sp_backward": 1},
    "correlation": {"gram.products": 2, "softmax_kl.forward": 1, "softmax_kl.backward": 1, "gram.cosine_backward": 1},
    "supervised": {"gram.products": 1, "gram.cosine_backward": 1},
}


def counted(patch: pytest.MonkeyPatch) -> dict[str, int]:
    """The calls of gram's and softmax_kl's implementations from here on, by "native gram.grams" and such names."""
    calls: dict[str, int] = {}

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*args)

        return counting

    for op, protocol in (("gram", Gram), ("softmax_kl", SoftmaxKL)):
        for backend in ("native", "reference"):
            module = backends.load(op, backend)
            for name in vars(protocol):
                if not name.startswith("_") and name != "supports":
                    patch.setattr(module, name, count(f"{backend} {op}.{name}", getattr(module, name)))
    return calls


def on_backends(rank: int, size: int, world: dist.ProcessGroup) -> dict[str, Any]:
    """Each loss on each backend asked for by name: its numbers, and which functions ran."""
    out: dict[str, Any] = {}
    data = tuple(mine(x, rank, size) for x in batch(size, torch.float32))
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        for backend in [name for name in ("native", "reference") if backends.why_not("gram", name, data[0]) is None]:
            for name in CALLS:
                calls.clear()
                with kdkernels.use_backend(backend):
                    model = DistributedDataParallel(Student(torch.float32))
                    out[f"{name} {backend}"] = train_step(model, LOSSES[name], data, group=world), dict(calls)
    with kdkernels.use_backend("triton"):  # which has nothing for a CPU
        out["triton"] = {
            name: raised(lambda name=name: train_step(Student(torch.float32), LOSSES[name], data, group=world))
            for name in CALLS
        }
    # and the group works as before
    out["afterwards"] = train_step(DistributedDataParallel(Student(torch.float32)), LOSSES["sp"], data, group=world)
    return out


def contract(rank: int, size: int, world: dist.ProcessGroup) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for dtype in (torch.float16, torch.bfloat16):
        for name, loss in HALF_LOSSES.items():
            s, t = (mine(x, rank, size) for x in half_leaves(size, dtype))
            if rank == 0:  # the order of the columns is one on all ranks, whatever lies where
                s = s.contiguous(memory_format=torch.channels_last)
            s.requires_grad_()
            value = loss(s, t, group=world)
            out[f"{name} {dtype}"] = value.detach(), torch.autograd.grad(value, s)[0]

    x, t, y = (mine(v, rank, size) for v in batch(size, torch.float32))
    x.requires_grad_()
    t.requires_grad_()
    for name, loss in (
        ("sp", lambda: sp_loss(x, t, group=world)),
        ("correlation", lambda: correlation_loss(x, t, views=VIEWS, group=world)),
        ("rkd", lambda: rkd_loss(x, t, group=world)),
        ("supervised", lambda: supervised_contrastive_loss(x, x.detach() + t[:, :6], y, group=world)),
    ):
        first = loss()
        (gradient,) = torch.autograd.grad(first, x, retain_graph=True)
        (again,) = torch.autograd.grad(first, x, retain_graph=True)
        second = raised(lambda first=first: torch.autograd.grad(first, x, create_graph=True))
        with torch.autocast("cpu", torch.bfloat16):
            cast = loss()
            (cast_gradient,) = torch.autograd.grad(cast, x)
        with torch.no_grad():
            silent = loss()
        # upstream gradients that differ are summed: the gradient of the sum of all ranks' terms
        (uneven,) = torch.autograd.grad((rank + 1) * loss(), x)
        out[name] = {
            "backward twice": torch.equal(gradient, again),
            "autocast": torch.equal(cast, first) and torch.equal(cast_gradient, gradient),
            "no_grad": torch.equal(silent, first) and silent.grad_fn is None,
            "second derivative": "second derivative" in second,
            "uneven upstream": bool((uneven - gradient * (size + 1) / 2).norm() <= 1e-5 * uneven.norm()),
        }

    alone = [dist.new_group([r]) for r in range(size)]
    out["one rank"] = {
        "equals no group": torch.equal(
            correlation_loss(x, t, views=VIEWS, group=alone[rank]), correlation_loss(x, t, views=VIEWS)
        )
    }
    out["not a member"] = raised(lambda: sp_loss(x, t, group=alone[(rank + 1) % size]))
    out["not a group"] = raised(lambda: sp_loss(x, t, group="world"))

    odd = rank == size - 1
    out["mismatch: widths"] = raised(lambda: sp_loss(x[:, : 4 if odd else 6], t, group=world))
    out["mismatch: dtypes"] = raised(lambda: sp_loss(x.double() if odd else x, t, group=world))
    out["mismatch: layers"] = raised(lambda: sp_loss([x] * (2 if odd else 1), [t] * (2 if odd else 1), group=world))
    out["mismatch: gradients"] = raised(lambda: sp_loss(x.detach() if odd else x, t, group=world))
    out["mismatch: temperature"] = raised(
        lambda: correlation_loss(x, t, views=VIEWS, temperature=0.7 if odd else 0.5, group=world)
    )
    out["mismatch: options"] = raised(lambda: rkd_loss(x, t, squared=odd, group=world))
    out["mismatch: losses"] = raised(
        lambda: sp_loss(x, t, group=world) if odd else correlation_loss(x, t, views=VIEWS, group=world)
    )
    return out


def failures(rank: int, size: int, world: dist.ProcessGroup) -> dict[str, Any]:
    dist.barrier(world)  # no rank waits SHORT for one that is still on its way to a new group
    everybody, pair, left = (dist.new_group(list(range(n)), timeout=SHORT) for n in (size, 2, size))
    x = torch.ones(3, 4)
    out = {"another group": raised_within(lambda: sp_loss(x, x, group=pair if rank == 1 else everybody))}
    dist.barrier(world)
    alone = dist.new_group(list(range(size)))
    with kdkernels.use_backend("triton" if rank == 1 else "reference"):
        out["another backend"] = raised_within(lambda: sp_loss(x, x, group=alone))
    dist.barrier(world)
    if rank == 1:
        os._exit(0)
    out["died"] = raised_within(lambda: [sp_loss(x, x, group=left) for _ in range(2)])
    return out


# ranks of a busy machine may be minutes apart; SHORT is for those that wait in vain
TIMEOUT, SHORT = datetime.timedelta(seconds=300), datetime.timedelta(seconds=4)
JOBS = {f.__name__: f for f in (same_numbers, on_backends, contract, failures)}


def work(rank: int, size: int, folder: str, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=TIMEOUT)
    for job in jobs:
        torch.save(JOBS[job](rank, size, dist.group.WORLD), f"{folder}/{job}-{rank}.pt")
    if "failures" in jobs:
        os._exit(0)  # gloo's own clean-up aborts the process now and then after a collective that failed
    dist.destroy_process_group()


def launch(size: int, folder: Path, *jobs: str) -> dict[str, list[dict[str, Any]]]:
    start = time.monotonic()
    context = start_ranks(work, (size, str(folder), list(jobs)), size, join=False)
    while not context.join(timeout=5):
        if time.monotonic() - start > 2 * TIMEOUT.total_seconds():
            for process in context.processes:
                process.kill()
            pytest.fail("the processes hang")
    return {job: [torch.load(path) for r in range(size) if (path := folder / f"{job}-{r}.pt").exists()] for job in jobs}
