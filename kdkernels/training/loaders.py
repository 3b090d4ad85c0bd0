"""A loader like another one, over another data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, Dataset

OPTIONS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)


def over(
    loader: DataLoader[Any], dataset: Dataset[Any], collate_fn: Callable[..., Any], **batches: Any
) -> DataLoader[Any]:
    """A loader in the order of ``loader``, with its workers; ``batches`` are other options than its own."""
    own: dict[str, Any] = {"batch_sampler": loader.batch_sampler}
    if loader.batch_size is not None:
        own = {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
    own |= {name: getattr(loader, name) for name in OPTIONS}
    return DataLoader(dataset, collate_fn=collate_fn, **(own | batches))
