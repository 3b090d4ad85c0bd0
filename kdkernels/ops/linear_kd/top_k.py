"""The row pass against the teacher's largest k log-probabilities: the student's softmax, then arithmetic of k numbers.

Outcomes are the k ids and, for "bucket" and "renormalise", all other tokens together, as the last one:

    rest               teacher p                                  student q
    "drop"             p_k                                        q_k           (neither sums to 1)
    "renormalise"      p_k / sum p, and 0                         q_k, and 1 - sum q
    "renormalise_both" p_k / sum p                                q_k / sum q
    "bucket"           p_k, and 1 - sum p                         q_k, and 1 - sum q    (both at least FLOOR)

    D = sum over outcomes of the divergence's terms;   with g = q dD/dq and S = sum g
    T dD/dz_j = g_j - q_j S at an id, q_j (g_rest / q_rest - S) elsewhere
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .columns import Columns, Softmax, softmaxes
from .divergence import divergence
from .hard import cross_entropy, cross_entropy_gradient, is_label, kept
from .record import LinearKD

FLOOR = 1e-7  # of a bucket's mass: what fp32 probabilities near 1 leave undecided
EXCESS = 0.02  # by which rounded log-probabilities may sum to more than 1


class Entries(NamedTuple):
    """A chunk's teacher."""

    ids: Tensor  # (n, k), in range
    real: Tensor  # (n, k) False: padding
    log_p: Tensor  # (n, k) or, with the rest, (n, k + 1); -inf where there is no entry
    valid: Tensor  # (n, 1)

    @property
    def has_rest(self) -> bool:
        return self.log_p.shape[1] > self.ids.shape[1]


def _is_valid(ids: Tensor, logprobs: Tensor, total: int, rest: str) -> Tensor:
    """(n,) No id is out of range or twice there and, where masses count, they are no more than 1."""
    real = logprobs != -math.inf
    inside = (((ids >= 0) & (ids < total)) | ~real).all(1)
    places = ids.where(real, -1 - torch.arange(ids.shape[1], device=ids.device))
    valid = inside & (places.sort(1).values.diff(dim=1) != 0).all(1)
    if rest in ("drop", "bucket"):
        valid &= ~(logprobs.exp().sum(1) > 1 + EXCESS)  # a NaN shows in the loss by itself
    return valid


def _entries(x: LinearKD, ids: Tensor, logprobs: Tensor, keep: Tensor | None, columns: Columns) -> Entries:
    rest = x.teacher.rest
    logprobs = logprobs.to(x.dtype)
    if keep is not None:  # whatever a row holds that does not count
        logprobs = logprobs.masked_fill(~keep[:, None], -math.inf)
    real = logprobs != -math.inf
    valid = _is_valid(ids, logprobs, columns.total, rest)[:, None]
    log_p = logprobs * (x.teacher.made_at / x.options.temperature)
    if rest == "bucket":
        mass = (1 - log_p.exp().sum(1, keepdim=True)).clamp(min=FLOOR)
        log_p = torch.cat([log_p, mass.log()], 1)
    elif rest != "drop":
        log_z = log_p.logsumexp(1, keepdim=True)
        log_p = log_p - log_z.masked_fill(log_z == -math.inf, 0)
        if rest == "renormalise":
            log_p = torch.cat([log_p, torch.full_like(log_z, -math.inf)], 1)
    return Entries(ids.clamp(0, columns.total - 1), real, log_p, valid)


class Student(NamedTuple):
    """What the row pass knows of the student's logits, of all columns."""

    soft: Softmax  # at the temperature
    rest: Softmax  # without the ids
    hard: Softmax  # at temperature 1
    at_ids: Tensor  # (n, k) logits
    at_label: Tensor  # (n, 1)
    mean: Tensor  # (n, 1)


def _student(
    x: LinearKD, z: Tensor, e: Tensor, top: Tensor, entries: Entries, target: Tensor | None, columns: Columns
) -> Student:
    """Leaves exp((z - top) / T) in e, which may be z, with 0 at the ids."""
    place, here = columns.find(entries.ids)
    exact = [z.gather(1, place).masked_fill(~here, 0)]
    sums = []
    if target is not None:  # there is a cross entropy
        label, label_here = columns.find(target[:, None])
        exact += [z.gather(1, label).masked_fill(~label_here, 0), z.sum(1, keepdim=True) / columns.total]
        sums.append((0, 1.0, torch.sub(z, top, out=e).exp_().sum(1, keepdim=True)))
    temperature = x.options.temperature
    torch.sub(z, top, out=e).div_(temperature).exp_()
    sums.append((0, temperature, e.sum(1, keepdim=True)))
    e.scatter_reduce_(1, place, (~(here & entries.real)).to(e.dtype), "prod")
    sums.append((0, temperature, e.sum(1, keepdim=True)))
    found = softmaxes(columns, [top], sums)
    logits = columns.add(torch.cat(exact, 1))
    at_ids, at_label, mean = logits[:, : place.shape[1]], logits[:, -2:-1], logits[:, -1:]
    return Student(found[-2], found[-1], found[0], at_ids, at_label, mean)


def _outcomes(x: LinearKD, entries: Entries, student: Student) -> tuple[Tensor, Tensor]:
    """log q of the outcomes, (n, k) or (n, k + 1), and which of them move with the logits."""
    log_q = (student.at_ids - student.soft.top) / x.options.temperature - student.soft.log_z
    moves = entries.real
    if x.teacher.rest == "renormalise_both":
        log_z = log_q.masked_fill(~entries.real, -math.inf).logsumexp(1, keepdim=True)
        log_q = log_q - log_z.masked_fill(log_z == -math.inf, 0)
    log_q = log_q.masked_fill(~entries.real, -math.inf)
    if entries.has_rest:
        log_rest = student.rest.log_z - student.soft.log_z
        least = math.log(FLOOR) if x.teacher.rest == "bucket" else -math.inf
        log_q = torch.cat([log_q, log_rest.clamp(min=least)], 1)
        moves = torch.cat([moves, log_rest > least], 1)
    return log_q, moves


def row_pass(
    x: LinearKD,
    z: Tensor,
    other: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    keep: Tensor | None,
    target: Tensor | None,
    columns: Columns,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The chunk's losses (n,) and, with ``upstream``, the gradient of its logits, in z's memory or ``other``'s."""
    entries = _entries(x, ids, logprobs, keep, columns)
    target = target if x.terms.ce else None
    e = z if target is None else other
    top = z.amax(1, keepdim=True)
    student = _student(x, z, e, top, entries, target, columns)
    log_q, moves = _outcomes(x, entries, student)
    has_teacher = entries.real.any(1, keepdim=True)
    options = x.options
    value, g = divergence(
        options.divergence, options.beta, entries.log_p, log_q, entries.log_p - log_q, x.teacher.rest == "drop"
    )
    losses = x.terms.kl * value.masked_fill(~has_teacher, 0)
    valid = entries.valid
    if target is not None:
        losses = losses + x.terms.ce * cross_entropy(x, student.hard, student.at_label, student.mean)
        valid = valid & is_label(target, columns)
    losses = kept(losses, valid, keep)
    if upstream is None:
        return losses[:, 0], None
    factor = kept(upstream.expand(len(z))[:, None], valid, keep)
    g = g.masked_fill(~(moves & has_teacher), 0) * (factor * x.terms.kl / options.temperature)
    _gradient(x, e, g, log_q, entries, top, student, columns)
    if target is not None:
        e.add_(cross_entropy_gradient(x, z, student.hard, target, columns, factor * x.terms.ce))
    return losses[:, 0], e


def _gradient(
    x: LinearKD, e: Tensor, g: Tensor, log_q: Tensor, entries: Entries, top: Tensor, student: Student, columns: Columns
) -> None:
    """e, exp((z - top) / T) with 0 at the ids, becomes the divergence's gradient."""
    k = entries.ids.shape[1]
    total = g.sum(1, keepdim=True)
    outside = -total
    if x.teacher.rest == "renormalise_both":
        outside = torch.zeros_like(total)
    elif entries.has_rest:
        outside = (g[:, k:] / log_q[:, k:].exp()).masked_fill(g[:, k:] == 0, 0) - total
    e.mul_(outside * ((top - student.soft.top) / x.options.temperature - student.soft.log_z).exp())
    place, here = columns.find(entries.ids)
    at_ids = g[:, :k] - log_q[:, :k].exp() * total
    e.scatter_add_(1, place, at_ids.masked_fill(~(here & entries.real), 0))


def check_values(x: LinearKD, keep: Tensor | None, columns: Columns) -> None:
    """Raise for entries that make a row NaN."""
    ids, logprobs = x.teacher.ids, x.teacher.logprobs
    if ids is None or logprobs is None:
        return
    bad = ~_is_valid(ids, logprobs.to(x.dtype), columns.total, x.teacher.rest)
    if keep is not None:
        bad &= keep
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"TopK of position {row} is invalid: its ids must differ and be in 0..{columns.total - 1}, and its "
            f"probabilities, the exponentials of logprobs, sum to at most 1 (-inf marks padding); it has ids "
            f"{ids[row].tolist()} and a sum of {float(logprobs[row].double().exp().sum()):.4g}"
        )
