"""What the losses with ``group=`` send in a step, by formula: the collectives of distributed.py and their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

EMBEDDING, VIEWS = 128, 4  # of MLKDLoss, by default
NUMBER, LABEL, WORD = 4, 8, 8  # bytes of an fp32, a label, a number in the agreement on the call


class Job(NamedTuple):
    """A step of one rank: its images, the ranks, the features' shapes without the batch, and their bytes each."""

    batch: int
    ranks: int
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    size: int = 4  # bytes of a feature's number: 4, or 2 under mixed precision

    @property
    def whole(self) -> int:
        return self.batch * self.ranks


class Collective(NamedTuple):
    """One collective: its kind, its purpose, and the bytes that this rank hands to it."""

    kind: str
    what: str
    payload: int

    def sent(self, ranks: int) -> float:
        """Bytes that leave a rank: each part of an all-to-all once, an all-reduce and an all-gather around a ring."""
        share = (ranks - 1) / ranks
        return self.payload * {"all_to_all": share, "all_reduce": 2 * share, "all_gather": ranks - 1.0}[self.kind]


def _agree() -> Collective:
    return Collective("all_gather", "row counts, a digest of the call", 3 * WORD)


def _columns(what: str, rows: int, width: int, size: int, ranks: int) -> Collective:
    """A rank's rows, their columns padded to a multiple of the ranks."""
    return Collective("all_to_all", what, rows * ranks * math.ceil(width / ranks) * size)


def _upstream() -> Collective:
    return Collective("all_reduce", "the loss's own gradient", NUMBER)


def _pair(job: Job, student: int, teacher: int, rows: int, matrices: list[Collective]) -> list[Collective]:
    """A loss of two features through B x B matrices, forward and backward."""
    return [
        _agree(),
        _columns("the student's columns", rows, student, job.size, job.ranks),
        _columns("the teacher's columns", rows, teacher, job.size, job.ranks),
        *matrices,
        _upstream(),
        _columns("the student's gradient", rows, student, job.size, job.ranks),
    ]


def sp(job: Job) -> list[Collective]:
    """Whole maps, as the paper has it; two Gram matrices."""
    matrices = [Collective("all_reduce", "two B x B matrices", 2 * job.whole**2 * NUMBER)]
    return _pair(job, math.prod(job.student), math.prod(job.teacher), job.batch, matrices)


def relation(size: int) -> Callable[[Job], list[Collective]]:
    """RKD, PKT, CC, IRG on pooled features; ``size``: bytes of a measure."""

    def collectives(job: Job) -> list[Collective]:
        matrices = [Collective("all_reduce", "two B x B matrices", 2 * job.whole**2 * size)]
        return _pair(job, job.student[0], job.teacher[0], job.batch, matrices)

    return collectives


def mlkd(job: Job, views: int = VIEWS, embedding: int = EMBEDDING) -> list[Collective]:
    """MLKD with its heads, whose outputs are fp32, on pooled features of ``views`` views of each image."""
    job, rows, whole = job._replace(size=NUMBER), views * job.batch, views * job.whole
    student, teacher = job.student[0], job.teacher[0]
    cosines = (views - 1) * job.whole**2 + whole  # and the rows' squares
    pairs = (2 * whole) ** 2 + 4 * whole  # of the student's and the teacher's embeddings together
    parts = [_columns(f"{who} embeddings", rows, embedding, NUMBER, job.ranks) for who in ("student", "teacher")]
    back = [Collective(part.kind, f"gradient of {part.what}", part.payload) for part in parts]
    labels = Collective("all_gather", "labels", rows * LABEL)
    similarity = Collective("all_reduce", "a 2 V B x 2 V B matrix", pairs * NUMBER)
    matrices = 2 * [Collective("all_reduce", "a (V - 1) B x B matrix", cosines * NUMBER)]
    correlation = _pair(job, student, teacher, rows, matrices)
    norms = [*_batch_norm(16 * teacher), *_batch_norm(student)]
    return [*norms, *correlation, _agree(), *parts, similarity, labels, _upstream(), *back]


def _batch_norm(width: int) -> list[Collective]:
    """A head's: sums of its rows and how many they are, sums of squares, and the gradients of both."""
    sums = [Collective("all_reduce", "a head's batch norm", size * NUMBER) for size in (width + 1, width)]
    return sums * 2


LOSSES: dict[str, Callable[[Job], list[Collective]]] = {
    "sp": sp,
    "rkd": relation(2 * NUMBER),  # squared distances are fp64
    "pkt": relation(NUMBER),
    "cc": relation(NUMBER),
    "irg": relation(2 * NUMBER),
    "mlkd": mlkd,
}
