"""linear_kd_loss with the vocabulary split over two gloo processes against one process with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checking import check_close
from forks import start_ranks
from ranks import raised
from test_linear_kd import DEFINED, LABELS, VOCABULARY, heads, teacher_of
from torch import Tensor

from kdkernels import Head, TopK, linear_kd_loss
from kdkernels.kd_loss import DIVERGENCES

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

SLICES = (slice(0, 6), slice(6, 14))  # uneven, the second with three columns of padding
UPSTREAM = 2.5
OPTIONS = {
    "ce": {"target": LABELS, "ce_weight": 0.3, "label_smoothing": 0.1, "temperature": 1.7},
    "rows": {"target": LABELS, "reduction": "none", "ce_weight": 0.3},
    "mask": {"mask": LABELS > 0, "denominator": 7.0, "scale_by_t2": False},
}
Found = tuple[Tensor, list[Tensor]]


def padded(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_full((3, *x.shape[1:]), 9.0)])


def networks(kind: str, dtype: torch.dtype, temperature: float) -> tuple[Head, Any]:
    hidden, weight, bias, t_hidden, t_weight, t_bias = heads(dtype)
    student = Head(hidden, padded(weight), padded(bias), scale=1.3, softcap=4.0)
    if kind == "head":
        return student, Head(t_hidden, padded(t_weight), padded(t_bias))
    teacher = teacher_of(kind, t_hidden, t_weight, t_bias, temperature)
    return student, padded(teacher.T).T if kind == "logits" else teacher


def cut(x: Any, columns: slice) -> Any:
    """A rank's part of a network."""
    if isinstance(x, Head):
        return x._replace(weight=x.weight[columns], bias=None if x.bias is None else x.bias[columns])
    return x if isinstance(x, TopK) else x[:, columns]


def step(
    kind: str, dtype: torch.dtype, divergence: str, options: dict[str, Any], columns: slice, **group: Any
) -> Found:
    student, teacher = networks(kind, dtype, options.get("temperature", 1.0))
    student, teacher = cut(student, columns), cut(teacher, columns)
    leaves = [x.clone().requires_grad_() for x in student[:3]]
    options = {"divergence": divergence, "vocab_size": VOCABULARY, "chunk": 4, **options, **group}
    loss = linear_kd_loss(student._replace(hidden=leaves[0], weight=leaves[1], bias=leaves[2]), teacher, **options)
    upstream = UPSTREAM * torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view_as(loss)
    return loss.detach(), list(torch.autograd.grad(loss, leaves, upstream))


OF_DIVERGENCE = dict(zip(DIVERGENCES, ("ce", "rows", "mask", "ce", "rows"), strict=True))
CASES = [(kind, divergence, OF_DIVERGENCE[divergence]) for kind, divergence in DEFINED]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = dist.group.WORLD
    out: dict[str, Any] = {}
    for kind, divergence, name in CASES:
        for dtype in (torch.float64, torch.float32):
            found = step(kind, dtype, divergence, OPTIONS[name], SLICES[rank], group=world)
            out[f"{kind} {divergence} {dtype}"] = found
    out["collectives"] = {kind: collectives(kind, SLICES[rank], world) for kind in ("head", "bucket")}

    odd = rank == 1
    student, teacher = (cut(x, SLICES[rank]) for x in networks("head", torch.float32, 1.0))
    for what, call in {
        "temperature": lambda: linear_kd_loss(student, teacher, temperature=2.0 if odd else 1.0, group=world),
        "positions": lambda: linear_kd_loss(
            *(x._replace(hidden=x.hidden[: 5 if odd else 6]) for x in (student, teacher)), group=world
        ),
        "target": lambda: linear_kd_loss(student, teacher, LABELS if odd else None, group=world),
        "vocabulary": lambda: linear_kd_loss(student, teacher, vocab_size=6, group=world),
        "decouple": lambda: linear_kd_loss(student, teacher, LABELS, decouple=(1, 8), group=world),
        "label": lambda: linear_kd_loss(student, teacher, LABELS + 7, ce_weight=1.0, vocab_size=11, group=world),
    }.items():
        out[what] = raised(call)
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def collectives(kind: str, columns: slice, world: Any) -> int:
    """How many tensors are exchanged in a call with three chunks."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce"):
            function = getattr(dist, name)
            patch.setattr(dist, name, lambda *a, f=function, **k: (calls.append(f), f(*a, **k))[1])
        step(kind, torch.float32, "jsd", {"chunk": 2, "target": LABELS, "ce_weight": 0.5}, columns, group=world)
    return len(calls)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("linear_kd")
    start_ranks(work, (str(folder),))
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("kind", "divergence", "name"), CASES)
def test_two_ranks_equal_one(ranks: list[dict[str, Any]], kind: str, divergence: str, name: str) -> None:
    loss, (d_hidden, *of_columns) = step(kind, torch.float64, divergence, OPTIONS[name], slice(0, 14))
    assert d_hidden.norm() > 1e-4, "a gradient this small proves nothing"
    for dtype, relative in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        found = [out[f"{kind} {divergence} {dtype}"] for out in ranks]
        assert torch.equal(found[0][0], found[1][0]), "the loss differs between ranks"
        for (value, gradients), columns in zip(found, SLICES, strict=True):
            check_close("loss", value, loss, relative)
            expected = [d_hidden, *(x[columns] for x in of_columns)]
            for what, a, e in zip(("hidden", "weight", "bias"), gradients, expected, strict=True):
                check_close(f"d_{what}", a, e, relative)


def test_two_collectives_a_chunk(ranks: list[dict[str, Any]]) -> None:
    """And one to agree on the call, and one for the hidden states' gradient."""
    for out in ranks:
        assert out["collectives"] == {"head": 2 * 3 + 2, "bucket": 2 * 3 + 2}


def test_a_call_that_is_invalid_raises_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for out in ranks:
        for what, words in {
            "temperature": ("rank 0: linear_kd_loss of 6 positions", "temperature=2.0"),
            "positions": ("6 positions", "5 positions"),
            "target": ("rank 1: ", "int64"),
            "vocabulary": ("vocab_size 6 must end in the last rank's slice", "[6, 8]"),
            "decouple": ("need every class of a row, which group= has not",),
            "label": ("target has label -93; valid are 0..10",),
        }.items():
            assert out[what].startswith("ValueError"), out[what]
            assert all(word in out[what] for word in words), out[what]
