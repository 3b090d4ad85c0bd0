"""relation in plain PyTorch, made fast: the fallback, and what GPUs run. What it computes is in definition.py.

Notation: D squared distances, d lengths, h or g a derivative, s student, t teacher. Every function returns the loss and
the derivative of the student's measures, which one of the two ``through_`` functions turns into W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gram.reference import grams, rows, sp_backward
from .op import CC, DISTANCES, IRG, PKT, RKD, Options, measure_dtype

TILES = {"cpu": 1 << 16}  # angles that are made at a time: what a cache holds ...
TILE = 1 << 20  # ... and elsewhere, where a launch costs more than memory
CC_EPS, DIRECTION_EPS = 1e-12, 1e-12


def supports(*tensors: Tensor) -> str | None:
    return None


def measures(features: list[Tensor], name: str) -> Tensor:
    if name not in DISTANCES:
        return grams(features)
    return torch.stack([_squared_distances(rows(x).to(measure_dtype(name, *features))) for x in features])


def _squared_distances(x: Tensor) -> Tensor:
    """By the differences themselves, which |x|^2 + |y|^2 - 2 <x, y> would lose where rows are nearly equal."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


def loss(measures: Tensor, options: Options, reduction: str, need_grad: bool) -> tuple[Tensor, Tensor]:
    student, teacher = measures
    batch, mean = len(student), reduction == "mean"
    scale = 1 / batch**2 if mean and batch else 1.0
    if isinstance(options, PKT | CC):
        formula = _pkt if isinstance(options, PKT) else _cc
        wide = torch.float64 if student.device.type in ("cpu", "cuda") else student.dtype
        value, matrix = formula(student.to(wide), teacher.to(wide), options, scale)  # type: ignore[arg-type]
        value, matrix = value.to(measures.dtype), matrix.to(measures.dtype)
    elif batch < 2:
        value, matrix = 0 * student.sum(), torch.zeros_like(student)
    elif isinstance(options, IRG):
        value, h = _irg(student, teacher, options, scale)
        matrix = _through_distances(h)
    else:
        value, h = _rkd_distances(student, teacher, options, scale)
        if options.angle_weight:
            angle_scale = options.angle_weight * (1 / batch**3 if mean else 1.0)
            angles, h_angles = _rkd_angles(student, teacher, angle_scale)
            value, h = value + angles, h + h_angles
        matrix = _through_distances(h)
    return value, matrix if need_grad else measures.new_empty(0)


def backward(grad: Tensor, student: Tensor, gradient_matrix: Tensor) -> Tensor:
    return sp_backward(grad, [student], gradient_matrix[None])[0]


# ---- distances


def _through_distances(h: Tensor) -> Tensor:
    """W of dL/dx_i = sum_j 2 (h_ij + h_ji) (x_i - x_j)."""
    both = 2 * (h + h.t())
    both.fill_diagonal_(0)
    return torch.diag(both.sum(1)) - both


def _lengths(squares: Tensor, eps: float, squared: bool) -> tuple[Tensor, Tensor]:
    """Lengths, 0 on the diagonal, and what they change by with the squares: nothing where these are clamped."""
    clamped = squares.clamp(min=eps)
    lengths = clamped if squared else clamped.sqrt()
    slopes = torch.ones_like(lengths) if squared else 0.5 / lengths
    own = torch.eye(len(squares), dtype=torch.bool, device=squares.device)
    return lengths.masked_fill(own, 0), slopes.masked_fill(own | (squares < eps), 0)


def _smooth_l1(difference: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and the derivative."""
    g = difference.clamp(-1, 1)
    return (g * (difference - 0.5 * g)).sum(), g


def _rkd_distances(d_s: Tensor, d_t: Tensor, options: RKD, scale: float) -> tuple[Tensor, Tensor]:
    s, slopes = _lengths(d_s, options.eps, options.squared)
    t, _ = _lengths(d_t, options.eps, options.squared)
    pairs = len(s) * (len(s) - 1)
    mean_s, mean_t = s.sum() / pairs, t.sum() / pairs
    total, g = _smooth_l1(s / mean_s - t / mean_t)
    scale *= options.distance_weight
    h = (g / mean_s - (g * s).sum() / (mean_s.square() * pairs)) * slopes
    return scale * total, scale * h


def _directions(squares: Tensor) -> Tensor:
    """1 / |x_i - x_j|, or 0 where there is no direction."""
    none = squares < DIRECTION_EPS**2
    return squares.masked_fill(none, 1).rsqrt().masked_fill(none, 0)


def _rkd_angles(d_s: Tensor, d_t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A[i, j, k] = (D_ij + D_ik - D_jk) / (2 d_ij d_ik), a tile of anchors i at a time.

    dL/dD_jk -= g_ijk / (2 d_ij d_ik), and dL/dD_ij += sum over k of g_ijk (1 / d_ik - A_ijk / d_ij) / d_ij
    """
    r_s, r_t = _directions(d_s), _directions(d_t)
    value, h = d_s.new_zeros(()), torch.zeros_like(d_s)
    step = max(1, TILES.get(d_s.device.type, TILE) // max(d_s.numel(), 1))
    for i in range(0, len(d_s), step):
        anchors = slice(i, i + step)
        s, t = _angles(d_s, r_s, anchors), _angles(d_t, r_t, anchors)
        total, g = _smooth_l1(s - t)
        value = value + total
        r = r_s[anchors]
        h[anchors] += r * (torch.einsum("ijk,ik->ij", g, r) - r * (g * s).sum(2))
        h -= 0.5 * (g * r[:, :, None] * r[:, None]).sum(0)
    return scale * value, scale * h


def _angles(squares: Tensor, inverse: Tensor, anchors: slice) -> Tensor:
    d, r = squares[anchors], inverse[anchors]
    return (d[:, :, None] + d[:, None] - squares).mul_(0.5 * r[:, :, None]).mul_(r[:, None])


def _irg(d_s: Tensor, d_t: Tensor, options: IRG, scale: float) -> tuple[Tensor, Tensor]:
    s, slopes = _lengths(d_s, options.eps, options.squared)
    t, _ = _lengths(d_t, options.eps, options.squared)
    top_s, top_t = s.max(), t.max()
    difference = s / top_s - t / top_t
    g = 2 * scale * difference
    highest = s == top_s
    through_top = (g * s).sum() / top_s.square() / highest.sum()
    return scale * difference.square().sum(), (g / top_s - highest * through_top) * slopes


# ---- cosines


def _inverse_norms(k: Tensor, eps: float, clamp: bool) -> tuple[Tensor, Tensor]:
    """The rows' inverse norms, and these over the norms, 0 where a norm is a constant. Zero rows have no direction."""
    norm = k.diagonal().sqrt()
    zero = norm == 0
    inverse = (1 / (norm.clamp(min=eps) if clamp else norm + eps)).masked_fill(zero, 0)
    return inverse, (inverse / norm).masked_fill(zero | (norm < eps) if clamp else zero, 0)


def _cosines(k: Tensor, inverse: Tensor) -> Tensor:
    return k * inverse[:, None] * inverse


def _through_cosines(h: Tensor, cosines: Tensor, inverse: Tensor, along: Tensor) -> Tensor:
    """W of dL/dcosines = h; ``inverse`` and ``along`` are _inverse_norms."""
    both = h + h.t()
    matrix = _cosines(both, inverse)
    matrix.diagonal().sub_(along * (both * cosines).sum(1))
    return matrix


def _pkt(k_s: Tensor, k_t: Tensor, options: PKT, scale: float) -> tuple[Tensor, Tensor]:
    eps = options.eps
    inverse, along = _inverse_norms(k_s, eps, clamp=False)
    s, t = _cosines(k_s, inverse), _cosines(k_t, _inverse_norms(k_t, eps, clamp=False)[0])
    m, q = s / 2 + 0.5, t / 2 + 0.5
    sums = m.sum(1, keepdim=True)
    p, q = m / sums, q / q.sum(1, keepdim=True)
    # log1p: the fractions are nearly 1, and what they miss of it is the loss
    value = scale * (q * ((q - p) / (p + eps)).log1p()).sum()
    h = -scale * q / (p + eps)
    h = (h - (h * p).sum(1, keepdim=True)) / (2 * sums)
    return value, _through_cosines(h, s, inverse, along)


def _cc(k_s: Tensor, k_t: Tensor, options: CC, scale: float) -> tuple[Tensor, Tensor]:
    if options.normalize:
        inverse, along = _inverse_norms(k_s, CC_EPS, clamp=True)
        s, t = _cosines(k_s, inverse), _cosines(k_t, _inverse_norms(k_t, CC_EPS, clamp=True)[0])
    else:
        inverse, along = k_s.new_ones(len(k_s)), k_s.new_zeros(len(k_s))
        s, t = k_s, k_t
    difference = _series(options.coefficients, s) - _series(options.coefficients, t)
    slopes = _series([p * c for p, c in enumerate(options.coefficients)][1:], s)
    h = 2 * scale * difference * slopes
    return scale * difference.square().sum(), _through_cosines(h, s, inverse, along)


def _series(coefficients: list[float], x: Tensor) -> Tensor:
    value = torch.zeros_like(x)
    for c in reversed(coefficients):
        value = value * x + c
    return value
