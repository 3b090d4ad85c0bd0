"""linear_kd as on a board: both networks' logits whole, differentiable PyTorch, the oracle of the tests.

z = cap(scale (h W^T + b)), cap(z) = c tanh(z / c);   the terms of a row are softmax_kl's (ops/softmax_kl/definition.py)

Of a teacher with k log-probabilities the divergence D is between p and q over K, the k ids, and perhaps all other
tokens as one more outcome (the names of ``rest`` are top_k.py's):

    drop              p, q over K           renormalise       p / sum p over K and 0;  q over K and 1 - sum q
    renormalise_both  each over its sum     bucket            p over K and 1 - sum p;  q over K and 1 - sum q
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..softmax_kl.definition import log_divergence
from ..softmax_kl.definition import softmax_kl as rows_of_logits
from ..softmax_kl.op import Labels, Rows, Terms
from .record import LinearKD
from .top_k import FLOOR

NONE = -100  # the label of rows that do not count


def linear_kd(x: LinearKD) -> Tensor:
    n, vocabulary, t, options = len(x.hidden), x.options.vocab_size or len(x.weight), x.teacher, x.options
    counts = torch.ones(n, dtype=torch.bool, device=x.hidden.device) if x.mask is None else x.mask
    if x.target is not None:
        counts = counts & (x.target != options.ignore_index)
    z = _logits(x.hidden, x.weight, x.bias, x.scale, x.softcap, x.dtype)[:, :vocabulary]
    target = torch.zeros_like(counts, dtype=torch.int64) if x.target is None else x.target
    labels = Labels(target.where(counts, NONE), ignore_index=NONE, smoothing=options.smoothing)
    if t.ids is not None:
        rows = rows_of_logits(Rows(z, z, labels, Terms(ce=x.terms.ce), reduction="none"))
        rows = rows + x.terms.kl * _top_k(x, z).masked_fill(~counts, 0)
    else:
        teacher = t.teacher_logits
        if teacher is None:
            head = (t.teacher_hidden, t.teacher_weight, t.teacher_bias)
            teacher = _logits(*head, t.teacher_scale, t.teacher_softcap, x.dtype)  # type: ignore[arg-type]
        temperature, divergence, beta, standardize, *_ = options
        rows = rows_of_logits(
            Rows(z, teacher[:, :vocabulary], labels, x.terms, temperature, "none", divergence, beta, standardize)
        )
    if options.reduction == "none":
        return rows
    count = counts.sum().clamp(min=1) if x.denominator is None else x.denominator
    return rows.sum() / (count if options.reduction == "mean" else 1)


def _logits(h: Tensor, w: Tensor, b: Tensor | None, scale: float, softcap: float, dtype: torch.dtype) -> Tensor:
    z = h.to(dtype) @ w.to(dtype).T
    z = scale * (z if b is None else z + b.to(dtype))
    return softcap * (z / softcap).tanh() if softcap else z


def _top_k(x: LinearKD, z: Tensor) -> Tensor:
    """(N,) D; an entry with log-probability -inf is in neither distribution, and a row without entries is 0."""
    assert x.teacher.ids is not None
    assert x.teacher.logprobs is not None
    rest, real = x.teacher.rest, x.teacher.logprobs > -torch.inf
    p = (x.teacher.logprobs.to(z.dtype) * (x.teacher.made_at / x.options.temperature)).exp()
    whole = (z / x.options.temperature).softmax(1)
    q = whole.gather(1, x.teacher.ids.where(real, 0)) * real
    if rest in ("renormalise", "renormalise_both"):
        p = p / p.sum(1, keepdim=True).where(real.any(1, keepdim=True), 1)
    if rest in ("renormalise", "bucket"):
        listed = torch.zeros_like(whole).scatter_add(1, x.teacher.ids.where(real, 0), real.to(z.dtype)) > 0
        others = [(1 - p.sum(1, keepdim=True)), whole.masked_fill(listed, 0).sum(1, keepdim=True)]
        others = [o.clamp(min=FLOOR) for o in others] if rest == "bucket" else [others[0] * 0, others[1]]
        p, q = torch.cat([p, others[0]], 1), torch.cat([q, others[1]], 1)
    elif rest == "renormalise_both":
        q = q / q.sum(1, keepdim=True).where(real.any(1, keepdim=True), 1)
    # log 0 is -inf, whose gradient would be NaN
    log_p, log_q = (d.masked_fill(d == 0, 1).log().masked_fill(d == 0, -torch.inf) for d in (p, q))
    return log_divergence(x.options.divergence, x.options.beta, log_p, log_q).masked_fill(~real.any(1), 0)
