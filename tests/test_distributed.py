"""Losses over ranks against one process on the concatenated batch: gloo processes, uneven batches (see ranks.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checking import by_definition, check_close
from ranks import CALLS, HALF_LOSSES, LOSSES, TIMEOUT, TOLERANCE, Student, batch, half_leaves, launch, mine, train_step
from torch import Tensor

from kdkernels import sp_loss
from kdkernels.ops.backend import why_not

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    size = request.param
    jobs = ("same_numbers", "on_backends", "contract")
    return size, launch(size, tmp_path_factory.mktemp(f"ranks{size}"), *jobs)


Results = tuple[int, dict[str, list[dict[str, Any]]]]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", [*LOSSES, "accumulated"])
def test_loss_and_averaged_gradients_equal_one_process(ranks: Results, name: str, dtype: torch.dtype) -> None:
    size, results = ranks
    expected, gradients = one_process("sp" if name == "accumulated" else name, size, dtype)
    found = [out[f"{name} {dtype}"] for out in results["same_numbers"]]
    assert len(found) == size
    check_same(found, expected, gradients, dtype)


def check_same(
    found: list[tuple[Tensor, list[Tensor]]], expected: Tensor, gradients: list[Tensor], dtype: torch.dtype
) -> None:
    """Every rank has the loss, the same to the last bit, and the parameters' gradients."""
    for loss, actual in found:
        assert torch.equal(loss, found[0][0]), "the loss differs between ranks"
        assert loss.dtype == dtype
        check_close("loss", loss, expected, TOLERANCE[dtype])
        assert len(actual) == len(gradients) == 2
        for i, (a, e) in enumerate(zip(actual, gradients, strict=True)):
            assert e.norm() > 1e-4, "a gradient this small proves nothing"
            check_close(f"gradient {i}", a, e, TOLERANCE[dtype])


def one_process(name: str, size: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the data and the model, rounded to ``dtype``, by the definition in fp64."""
    data = tuple(x.double() if x.is_floating_point() else x for x in batch(size, dtype))
    with by_definition():
        return train_step(Student(dtype).double(), LOSSES[name], data)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", list(CALLS))
def test_a_backend_by_name_runs_on_every_rank(ranks: Results, name: str, backend: str) -> None:
    size, results = ranks
    if (reason := why_not("gram", backend, torch.ones(2, 2))) is not None:
        pytest.skip(reason)
    found = [out[f"{name} {backend}"] for out in results["on_backends"]]
    assert len(found) == size
    for _, calls in found:
        assert calls == {f"{backend} {function}": n for function, n in CALLS[name].items()}
    check_same([numbers for numbers, _ in found], *one_process(name, size, torch.float32), torch.float32)


def test_a_backend_that_cannot_run_raises_on_every_rank(ranks: Results) -> None:
    size, results = ranks
    assert len(results["on_backends"]) == size
    for out in results["on_backends"]:
        assert list(out["triton"]) == list(CALLS)
        for message in out["triton"].values():
            assert message.startswith("BackendError: backend 'triton' was asked for by name and cannot run")
    check_same(
        [out["afterwards"] for out in results["on_backends"]], *one_process("sp", size, torch.float32), torch.float32
    )


def test_accumulation_keeps_the_broadcast_of_buffers(ranks: Results) -> None:
    for out in ranks[1]["same_numbers"]:
        ours, plain = out["buffers"]
        assert len(ours) == 3
        assert ours[2].item() == 4
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(HALF_LOSSES))
def test_half_features_are_computed_in_fp32(ranks: Results, name: str, dtype: torch.dtype) -> None:
    size, results = ranks
    s, t = half_leaves(size, dtype)
    exact = s.double().requires_grad_()
    loss = HALF_LOSSES[name](exact, t.double())
    (gradient,) = torch.autograd.grad(loss, exact)
    for rank, out in enumerate(results["contract"]):
        value, actual = out[f"{name} {dtype}"]
        assert value.dtype == torch.float32
        assert actual.dtype == dtype
        check_close("loss", value, loss, 1e-5)
        # before any averaging a rank's rows get size times the one process's gradient
        check_close("gradient", actual, size * mine(gradient, rank, size), 1e-5, dtype)


def test_contract(ranks: Results) -> None:
    for out in ranks[1]["contract"]:
        for name in ("sp", "correlation", "rkd", "supervised", "one rank"):
            assert all(out[name].values()), f"{name}: {out[name]}"


def test_a_call_that_differs_raises_on_every_rank(ranks: Results) -> None:
    size, results = ranks
    assert len(results["contract"]) == size
    for what, both in {
        "widths": ("(B, 6) float32", "(B, 4) float32"),
        "dtypes": ("(B, 6) float32", "(B, 6) float64"),
        "layers": ("layer_weights=[1.0],", "layer_weights=[1.0, 1.0],"),
        "gradients": ("(B, 6) float32 with gradient", "(B, 6) float32,"),
        "temperature": ("temperature=0.5", "temperature=0.7"),
        "options": ("squared=False", "squared=True"),
        "losses": ("correlation_loss", "sp_loss"),
    }.items():
        for out in results["contract"]:
            message = out[f"mismatch: {what}"]
            assert message.startswith("ValueError"), message
            assert "rank 0" in message
            assert f"rank {size - 1}" in message
            assert all(part in message for part in both), message


def test_a_wrong_group_raises(ranks: Results) -> None:
    for out in ranks[1]["contract"]:
        assert out["not a member"].startswith("ValueError")
        assert "not a member" in out["not a member"]
        assert out["not a group"].startswith("TypeError")
        assert "str" in out["not a group"]


def test_a_missing_rank_raises_within_the_timeout(tmp_path: Path) -> None:
    results = launch(3, tmp_path, "failures")["failures"]
    assert len(results) == 2  # rank 1 left without a result, as it was told to
    for out in results:
        for what in ("another group", "another backend", "died"):
            message, seconds = out[what]
            assert "Error: " in message
            assert seconds < TIMEOUT.total_seconds() / 2, message
        # backends are part of the call that the ranks agree on, so nobody waits for a rank that cannot make it
        assert out["another backend"][0].startswith("ValueError")
        assert "backend triton" in out["another backend"][0]


def test_import_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    x = torch.randn(4, 5)
    assert sp_loss(x, x.square(), group=None).item() > 0
    with pytest.raises(TypeError, match=r"ProcessGroup or None, got int"):
        sp_loss(x, x, group=3)  # type: ignore[arg-type]
