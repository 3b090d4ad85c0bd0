"""channel_distance in plain PyTorch, made fast. What it computes is in definition.py.

Gradients are closed forms. On a CPU the samples go by in parts whose products stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import compute_dtype, may_hold
from .op import UNIT_EPS, GramPairs

CACHED = 1 << 19  # numbers that a part's products may have for them to stay in the last cache
# of a factor and where to: writes the factor times the gradient by X_s, or those by X_s and Y_s
Gradients = Callable[..., object]
# of X_s, Y_s, X_t, Y_t, some samples' (b, C, M): the values (b,), and what makes the gradients
Distance = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Gradients]]


def supports(*tensors: Tensor) -> str | None:
    return None


def forward(x: GramPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
    return by_parts(x, need_grad, DISTANCES[x.kind])


def by_parts(x: GramPairs, need_grad: bool, distance: Distance) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(*x.student, *x.teacher)
    like = x.student[0].new_empty(0, dtype=dtype)
    sizes = [s.numel() if need_grad else 0 for s in x.student]
    unscaled = like.new_empty(sum(sizes))
    targets = [g.view(s.shape) for s, g in zip(x.student, unscaled.split(sizes), strict=True)] if need_grad else []
    target_pairs = x.pairs(targets) if need_grad else [None] * len(x.layer_weights)
    losses = like.new_empty(len(x.layer_weights), len(x.student[0]))
    pairs = zip(x.pairs(x.student), x.pairs(x.teacher), target_pairs, x.factors(), strict=True)
    for i, (student, teacher, target_pair, factor) in enumerate(pairs):
        for part in _parts(*student, *teacher):
            values, gradients = distance(*(t[part].to(dtype) for t in (*student, *teacher)))
            losses[i, part] = values.mul_(factor)
            if target_pair is not None:
                gradients(factor, *(t[part] for t in target_pair))
    total = losses if x.per_sample else losses.sum(1)
    return total if x.per_layer else total.sum(0), unscaled


def _parts(*tensors: Tensor) -> list[slice]:
    batch = len(tensors[0])
    if tensors[0].device.type != "cpu":
        return [slice(batch)]
    largest = max(t.shape[1] * (t.shape[1] + t.shape[2]) for t in tensors)
    parts = max(1, -(-batch * largest // CACHED))
    threads = torch.get_num_threads()  # among which PyTorch deals out whole products
    step = max(1, -(-batch // (parts * threads))) * threads
    return [slice(start, start + step) for start in range(0, batch, step)]


def _norms(x: Tensor) -> Tensor:
    """Of rows whose squares may overflow."""
    norms = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    if may_hold(large := norms == torch.inf):
        top = x.abs().amax(2, keepdim=True)
        norms = torch.where(large, torch.linalg.vector_norm(x / top, dim=2, keepdim=True) * top, norms)
    return norms


def nst(x_s: Tensor, _: Tensor, x_t: Tensor, __: Tensor) -> tuple[Tensor, Gradients]:
    """||K_s - K_t||^2 of K = u^T u, u the unit rows over sqrt(C)."""
    norms, norms_t = _norms(x_s), _norms(x_t).clamp_(min=UNIT_EPS)
    lengths = norms.clamp(min=UNIT_EPS)
    c_s, c_t, pixels = max(x_s.shape[1], 1), max(x_t.shape[1], 1), x_s.shape[2]
    student, teacher = x_s / (lengths * c_s**0.5), x_t / (norms_t * c_t**0.5)
    by = _by_pixels if 3 * pixels <= 5 * max(c_s, c_t) else _by_channels
    values, product = by(student, teacher)

    def gradients(factor: float, to: Tensor, _: Tensor) -> None:
        pull = product().mul_(4 * factor / (lengths * c_s**0.5))
        # what is along a row is lost in its normalisation, but for a row under the eps, whose norm is a constant
        inner = (pull * student).sum(2, keepdim=True).mul_(c_s).masked_fill_(norms < UNIT_EPS, 0)
        torch.addcmul(pull, inner, student, value=-1, out=to)

    return values, gradients


def _by_pixels(student: Tensor, teacher: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """||D||^2, and what makes s D, of D = s^T s - t^T t (M, M)."""
    d = torch.baddbmm(torch.bmm(teacher.mT, teacher), student.mT, student, beta=-1)
    return d.square().sum((1, 2)), lambda: torch.bmm(student, d)


def _by_channels(student: Tensor, teacher: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """The same by products of channels alone.

    With E = s - t and S = (s + t) / 2, D is E^T S + S^T E, so that nothing cancels when the student is close to its
    teacher; missing channels are 0.
    """
    channels = student.shape[1]
    most = max(channels, teacher.shape[1])
    student, teacher = (torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[1])) for x in (student, teacher))
    e = student - teacher
    s = teacher.add(e, alpha=0.5)
    ee, ss, es = torch.bmm(e, e.mT), torch.bmm(s, s.mT), torch.bmm(e, s.mT)
    values = 2 * ((ee * ss).sum((1, 2)) + (es * es.mT).sum((1, 2)))

    def product() -> Tensor:  # (s E^T) S + (s S^T) E with s = S + E / 2
        return torch.bmm(es.mT.add(ee, alpha=0.5), s).baddbmm_(ss.add(es, alpha=0.5), e)[:, :channels]

    return values, product


def ickd(x_s: Tensor, _: Tensor, x_t: Tensor, __: Tensor) -> tuple[Tensor, Gradients]:
    """||G_s - G_t||^2 / C of the unit rows G of K = X X^T: SP's formula for the channels of a sample."""
    k_s, k_t, c = torch.bmm(x_s, x_s.mT), torch.bmm(x_t, x_t.mT), 1 / max(x_s.shape[1], 1)
    norm_s, norm_t = _norms(k_s), _norms(k_t)
    length_s, length_t = norm_s.clamp(min=UNIT_EPS), norm_t.clamp(min=UNIT_EPS)
    d = (k_s / length_s).addcdiv_(k_t, length_t, value=-1)
    rows = _norms(d).square_()

    def gradients(factor: float, to: Tensor, _: Tensor) -> None:
        # <G_s, 2 D> is |D|^2 for unit rows; a row under the eps is shorter than 1, and its norm is a constant
        inner = rows + (norm_s / length_s).square() - (norm_t / length_t).square()
        inner.masked_fill_(norm_s < UNIT_EPS, 0)
        # H = a_i K_s - b_i K_t, and H + H^T without a transposition, as both K are symmetric
        a = (2 * c * factor - c * factor * inner) / (length_s * length_s)
        b = torch.full_like(a, 2 * c * factor) / (length_s * length_t)  # not a reciprocal: equal networks have a = b
        h = torch.add(a, a.mT, out=d).mul_(k_s).sub_(k_t.mul_(b + b.mT))  # no addcmul_: equal products cancel
        torch.bmm(h, x_s, out=to)

    return c * rows.sum((1, 2)), gradients


def fsp(x_s: Tensor, y_s: Tensor, x_t: Tensor, y_t: Tensor) -> tuple[Tensor, Gradients]:
    """||X_s Y_s^T / M_s - X_t Y_t^T / M_t||^2 / (C C')."""
    c, pixels = 1 / max(x_s.shape[1] * y_s.shape[1], 1), max(x_s.shape[2], 1)
    d = torch.bmm(x_s, y_s.mT).div_(pixels).sub_(torch.bmm(x_t, y_t.mT).div_(max(x_t.shape[2], 1)))

    def gradients(factor: float, to_x: Tensor, to_y: Tensor) -> None:
        pull = d * (2 * c * factor / pixels)
        torch.bmm(pull, y_s, out=to_x)
        torch.bmm(pull.mT, x_s, out=to_y)

    return c * d.square().sum((1, 2)), gradients


DISTANCES: dict[str, Distance] = {"nst": nst, "ickd": ickd, "fsp": fsp}
