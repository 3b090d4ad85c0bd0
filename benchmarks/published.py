"""The losses as their papers and the usual repositories write them: what the kernels are measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    log_q = F.log_softmax(student / temperature, dim=1)
    q = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_q, q, reduction="sum") * temperature**2 / student.shape[0]


def stkd(
    student: Tensor, teacher: Tensor, target: Tensor, target_mixed: Tensor, lam: Tensor, temperature: float = 4.0
) -> Tensor:
    ce = lam * F.cross_entropy(student, target) + (1 - lam) * F.cross_entropy(student, target_mixed)
    return 0.1 * ce + 0.9 * kd(student, teacher, temperature)


def dkd(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """Decoupled KD (arXiv 2203.08679): the labelled class against the rest, and the rest with the label masked out."""
    label = F.one_hot(target, student.shape[1]).bool()
    p_s, p_t = (F.softmax(x / temperature, dim=1) for x in (student, teacher))
    two_s, two_t = (torch.stack([(p * label).sum(1), (p * ~label).sum(1)], dim=1) for p in (p_s, p_t))
    tckd = F.kl_div(two_s.log(), two_t, reduction="batchmean")
    rest_s, rest_t = (x / temperature - 1000.0 * label for x in (student, teacher))
    nckd = F.kl_div(F.log_softmax(rest_s, dim=1), F.softmax(rest_t, dim=1), reduction="batchmean")
    return (alpha * tckd + beta * nckd) * temperature**2


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    b = student.shape[0]
    student, teacher = student.view(b, -1), teacher.view(b, -1)
    g_s = F.normalize(torch.mm(student, student.t()))
    g_t = F.normalize(torch.mm(teacher, teacher.t()))
    difference = g_t - g_s
    return (difference * difference).view(-1, 1).sum(0) / (b * b)


def amd(student: Tensor, teacher: Tensor, margin: float = 1.35, scale: float = 64.0) -> Tensor:
    maps = [_angular(x, margin, scale) for x in (student, teacher)]
    return sum((_unit(s) - _unit(t)).pow(2).mean() for s, t in zip(*maps, strict=True)) / 3


def _angular(x: Tensor, margin: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    r = x.pow(2).sum(1).view(x.shape[0], -1)
    q = r / (r.norm(dim=1, keepdim=True) + 1e-6)
    w = 1 - q
    u = torch.cos(margin * torch.acos(q.clamp(-1 + 1e-7, 1 - 1e-7)))
    positive, negative = torch.exp(scale * u), torch.exp(scale * w)
    return torch.log(positive / (positive + negative)), u, w


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, p=2, dim=1)


def correlation(student: Tensor, teacher: Tensor, views: int = 4, tau: float = 0.5) -> Tensor:
    """MLKD's, its operands broadcast to ((V - 1) B, d, B)."""
    matrices = []
    for x in (student, teacher):
        x = x.view(-1, views, x.shape[1])
        rows, columns = x[:, 1:].flatten(0, 1), x[:, 0]
        matrices.append(F.cosine_similarity(rows[:, :, None], columns.t()[None], dim=1) / tau)
    return F.kl_div(F.log_softmax(matrices[0], 1), F.softmax(matrices[1], 1), reduction="batchmean")


def at(student: Tensor, teacher: Tensor, p: int = 2) -> Tensor:
    return (_attention(student, p) - _attention(teacher, p)).pow(2).mean()


def ft(student: Tensor, teacher: Tensor) -> Tensor:
    return (_attention(student, 2) - _attention(teacher, 2)).abs().mean()


def _attention(x: Tensor, p: int) -> Tensor:
    return F.normalize(x.pow(p).mean(1).flatten(1))


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    means = [_poly(a, b).mean() for a, b in ((teacher, teacher), (student, student), (student, teacher))]
    return means[0].detach() + means[1] - 2 * means[2]


def _poly(a: Tensor, b: Tensor) -> Tensor:
    """As published: (B, C, C, H W) numbers."""
    return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2)


def ickd(student: Tensor, teacher: Tensor) -> Tensor:
    grams = []
    for x in (student, teacher):
        x = x.flatten(2)
        grams.append(F.normalize(torch.bmm(x, x.permute(0, 2, 1)), dim=2))
    difference = grams[0] - grams[1]
    return (difference * difference).sum() / (student.shape[1] * student.shape[0])


def fsp(*layers: Tensor) -> Tensor:
    """The student's layers, then the teacher's."""
    half = len(layers) // 2
    losses = []
    for i in range(half - 1):
        s, t = (_fsp(layers[i + start], layers[i + start + 1]) for start in (0, half))
        losses.append((s - t).pow(2).mean())
    return sum(losses)


def _fsp(bottom: Tensor, top: Tensor) -> Tensor:
    """As published: (B, C', C, H W) numbers."""
    if bottom.shape[2] > top.shape[2]:
        bottom = F.adaptive_avg_pool2d(bottom, top.shape[2:])
    elif bottom.shape[2] < top.shape[2]:
        top = F.adaptive_avg_pool2d(top, bottom.shape[2:])
    return (bottom.flatten(2).unsqueeze(1) * top.flatten(2).unsqueeze(2)).mean(-1)
