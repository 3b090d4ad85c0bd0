"""Losses in eight threads at once, and in the worker processes of a DataLoader."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from checking import DEVICE, gradients
from every_loss import CLASSES, LOSSES
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import kdkernels

THREADS = 8


def pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(33, CLASSES, generator=generator).to(DEVICE) for _ in range(2))
    return s.requires_grad_(), t


def results(seed: int) -> list[Tensor]:
    """Every loss's value and gradient."""
    s, t = pair(seed)
    found = []
    for loss in LOSSES.values():
        value = loss(s, t)
        found += [value.detach(), *gradients(value, [s])]
    return found


def test_eight_threads_get_the_numbers_of_one() -> None:
    start = Barrier(THREADS)

    def work(seed: int) -> list[list[Tensor]]:
        start.wait()
        return [results(seed) for _ in range(3)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, range(THREADS)))
    for seed, rounds in enumerate(found):
        expected = results(seed)
        for actual in rounds:
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


class Losses(Dataset):
    """Numbers that a worker computes: how hard each sample is, say."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        s, t = pair(index)
        with kdkernels.use_backend("auto"):
            return torch.stack([kdkernels.kd_loss(s, t), kdkernels.sp_loss(s, t), kdkernels.rkd_loss(s, t)]).detach()


@pytest.mark.skipif(DEVICE != "cpu", reason="a forked process cannot use CUDA")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_compute_losses(method: str) -> None:
    dataset = Losses()
    expected = torch.stack([dataset[i] for i in range(4)])  # so that the parent has used its threads before the fork
    loader = DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), expected)
