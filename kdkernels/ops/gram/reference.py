"""gram in plain PyTorch, made fast: the fallback. What it computes is in definition.py.

Notation: Q (B, D) features of a batch, K = Q Q^T, G = K with normalised rows, n the rows' norms; s student, t teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype, grad_like, is_channels_last
from .op import COSINE_EPS, LayerPairs, SPOptions

SLICE = 4096  # columns summed in fp32 alone: what two Grams differ by would drown in the rounding of longer sums


def supports(*tensors: Tensor) -> str | None:
    return None


def rows(x: Tensor) -> Tensor:
    """(B, ...) as (B, D). The order along D is free, as a Gram matrix does not see it: channels_last needs no copy."""
    if is_channels_last(x):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(x.shape[0], -1) if x.numel() else x.new_empty(x.shape[0], 0)


def _normalise(k: Tensor, row_norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """G and the rows' norms before the clamp. Squares are of K / max|K|: large features must not overflow."""
    if row_norm == "l1":
        norm = k.abs().sum(1, keepdim=True)
    else:
        top = k.abs().amax(1, keepdim=True).clamp(min=torch.finfo(k.dtype).tiny) if k.numel() else k.sum(1, True)
        norm = torch.linalg.vector_norm(k / top, dim=1, keepdim=True).mul_(top)
    return k / norm.clamp(min=eps), norm


def sp_forward(x: LayerPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
    matrices = grams([*x.student, *x.teacher])
    return sp_from_grams(matrices.unflatten(0, (2, len(x.student))), x.options, need_grad)


def grams(features: list[Tensor]) -> Tensor:
    dtype = compute_dtype(*features)
    return torch.stack([_gram(rows(x).to(dtype)) for x in features])


def _gram(q: Tensor) -> Tensor:
    """K = Q Q^T: a sum over columns, so that the Gram matrices of column shards add up to it."""
    if q.dtype == torch.float64 or q.shape[1] <= SLICE:
        return q @ q.t()
    wide = torch.float64 if q.device.type in ("cpu", "cuda") else q.dtype  # not every device has fp64
    return torch.stack([part @ part.t() for part in q.split(SLICE, dim=1)]).sum(0, dtype=wide).to(q.dtype)


def sp_from_grams(grams: Tensor, options: SPOptions, need_grad: bool) -> tuple[Tensor, Tensor]:
    losses, matrices = [], []
    for k_s, k_t, scale in zip(*grams, options.scales(grams.shape[-1]), strict=True):
        g_s, n_s = _normalise(k_s, options.row_norm, options.eps)
        g_t, _ = _normalise(k_t, options.row_norm, options.eps)
        difference = g_s - g_t
        losses.append(scale * difference.square().sum())
        if need_grad:
            r = difference.mul_(2 * scale)
            inner = (r * g_s).sum(1, keepdim=True).masked_fill_(n_s < options.eps, 0)  # below eps the norm is constant
            direction = g_s if options.row_norm == "l2" else k_s.sign()
            h = (r - inner * direction) / n_s.clamp(min=options.eps)
            if not options.zero_row_grad:
                h = h.masked_fill(n_s == 0, 0)  # an all-zero row has no direction to normalise
            matrices.append(h + h.t())
    loss = torch.stack(losses)
    loss = loss if options.per_layer else loss.sum()
    return loss, torch.stack(matrices) if matrices else loss.new_empty(0)


def sp_backward(grad: Tensor, student: list[Tensor], gradient_matrix: Tensor) -> list[Tensor]:
    gradients = []
    for s, w, g in zip(student, gradient_matrix, grad.expand(len(student)), strict=True):
        out = grad_like(s)
        target = out.permute(0, 2, 3, 1) if is_channels_last(out) else out
        # (w g) Q, not w (Q g): a loss scale of 2^16 must not overflow half features
        target.copy_(((w * g) @ rows(s).to(w.dtype)).view(target.shape))
        gradients.append(out)
    return gradients


def products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(a, b)
    a, b = a.to(dtype), b.to(dtype)
    return a @ b.t(), a.square().sum(1), b.square().sum(1)


def cosine_forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(a, b)
    a, b = a.to(dtype), b.to(dtype)
    inverse_a, inverse_b = (_inverse_norm(x) for x in (a, b))
    return (a * inverse_a[:, None]) @ (b * inverse_b[:, None]).t(), inverse_a, inverse_b


def _inverse_norm(x: Tensor) -> Tensor:
    """By way of the largest number: squares of large features overflow."""
    if x.numel() == 0:
        return x.new_full((len(x),), 1 / COSINE_EPS)
    top = x.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny)
    return 1 / torch.linalg.vector_norm(x / top, dim=1).mul_(top[:, 0]).clamp_(min=COSINE_EPS)


def cosine_backward(
    grad: Tensor, a: Tensor, b: Tensor, similarity: Tensor, inverse_a: Tensor, inverse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """With a^ = a / |a|: da = (dS b^ - rowsum(dS * S) a^) / |a|, and the same for b with dS^T."""
    inner = grad * similarity
    unit_a, unit_b = (x.to(grad.dtype) * i[:, None] for x, i in ((a, inverse_a), (b, inverse_b)))
    da = _project(grad @ unit_b, unit_a, inner.sum(1), inverse_a)
    db = _project(grad.t() @ unit_a, unit_b, inner.sum(0), inverse_b)
    return da.to(a.dtype), db.to(b.dtype)


def _project(gradient: Tensor, unit: Tensor, inner: Tensor, inverse: Tensor) -> Tensor:
    # below the eps the norm is a constant, so nothing is projected out
    inner = inner.masked_fill(inverse >= 1 / COSINE_EPS, 0)
    return (gradient - inner[:, None] * unit) * inverse[:, None]
