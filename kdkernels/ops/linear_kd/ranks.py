"""The row pass where each rank has a slice of the vocabulary. Two collectives a chunk: an all-gather of every rank's
maxima and sums, and an all-reduce of what the terms need of all columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .columns import Columns, Softmax, softmaxes
from .divergence import divergence
from .hard import cross_entropy, cross_entropy_gradient, is_label, kept
from .record import LinearKD


def _exp_sum(z: Tensor, top: Tensor, temperature: float) -> Tensor:
    return ((z - top) / temperature).exp_().sum(1, keepdim=True)


def row_pass(
    x: LinearKD,
    z: Tensor,
    t: Tensor,
    keep: Tensor | None,
    target: Tensor | None,
    columns: Columns,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The chunk's losses (n,) and, with ``upstream``, the gradient of this rank's columns of its logits."""
    temperature, ce = x.options.temperature, target is not None and x.terms.ce != 0
    t = t.to(z.dtype)
    if keep is not None:  # whatever a row holds that does not count
        t = t.masked_fill(~keep[:, None], 0)
    tops = [z.amax(1, keepdim=True), t.amax(1, keepdim=True)]
    sums = [(i, temperature, _exp_sum(logits, tops[i], temperature)) for i, logits in enumerate((z, t))]
    if ce:
        sums.append((0, 1.0, _exp_sum(z, tops[0], 1.0)))
    of_s, of_t, *hard = softmaxes(columns, tops, sums)
    log_q, log_p, delta = _logs(z, t, of_s, of_t, temperature)
    value, g = divergence(x.options.divergence, x.options.beta, log_p, log_q, delta)
    exact = [value, g.sum(1, keepdim=True)]
    valid = torch.ones_like(exact[0], dtype=torch.bool)
    if ce and target is not None:
        place, here = columns.find(target[:, None])
        exact += [z.gather(1, place).masked_fill(~here, 0), z.sum(1, keepdim=True) / columns.total]
        valid = is_label(target, columns)
    value, total, *labelled = columns.add(torch.cat(exact, 1)).split(1, 1)
    losses = x.terms.kl * value
    if ce:
        losses = losses + x.terms.ce * cross_entropy(x, hard[0], *labelled)
    losses = kept(losses, valid, keep)[:, 0]
    if upstream is None:
        return losses, None
    factor = kept(upstream.expand(len(z))[:, None], valid, keep)
    gradient = g.sub_(log_q.exp_().mul_(total)).mul_(factor * (x.terms.kl / temperature))
    if ce and target is not None:
        gradient.add_(cross_entropy_gradient(x, z, hard[0], target, columns, factor * x.terms.ce))
    return losses, gradient


def _logs(z: Tensor, t: Tensor, of_s: Softmax, of_t: Softmax, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log q, log p and their difference log(p / q), which is taken between logits first."""
    s, t = ((logits - of.top) / temperature for logits, of in ((z, of_s), (t, of_t)))
    delta = (t - s) - (of_t.log_z - of_s.log_z)
    return s.sub_(of_s.log_z), t.sub_(of_t.log_z), delta
