"""The losses as their papers and the usual repositories write them: what the kernels are measured against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    log_q = F.log_softmax(student / temperature, dim=1)
    q = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_q, q, reduction="sum") * temperature**2 / student.shape[0]


def kd_reverse(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    return kd(teacher, student, temperature)


def kd_jsd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """As in TRL, at beta 0.5."""
    log_q, log_p = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))
    log_m = torch.logsumexp(torch.stack([log_q, log_p]) + math.log(0.5), dim=0)
    parts = [F.kl_div(log_m, x, reduction="sum", log_target=True) for x in (log_p, log_q)]
    return 0.5 * (parts[0] + parts[1]) * temperature**2 / student.shape[0]


def kd_standardized(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Logit standardisation (CVPR 2024)."""
    student, teacher = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in (student, teacher))
    return kd(student, teacher, temperature)


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


def rkd(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Distances from a Gram matrix, angles from all B^2 differences."""
    lengths, angles = [], []
    for x in (student, teacher):
        d = _squared_distances(x).sqrt()
        d = d.masked_fill(torch.eye(len(d), dtype=torch.bool, device=d.device), 0)
        lengths.append(d / d[d > 0].mean())
        e = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2)
        angles.append(torch.bmm(e, e.transpose(1, 2)).view(-1))
    return distance_weight * F.smooth_l1_loss(*lengths) + angle_weight * F.smooth_l1_loss(*angles)


def _squared_distances(x: Tensor, eps: float = 1e-12) -> Tensor:
    squares = x.pow(2).sum(dim=1)
    return (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * x @ x.t()).clamp(min=eps)


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    probabilities = []
    for x in (student, teacher):
        x = x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + eps)
        k = (x @ x.t() + 1) / 2
        probabilities.append(k / k.sum(dim=1, keepdim=True))
    p, q = probabilities
    return torch.mean(q * torch.log((q + eps) / (p + eps)))


def cc(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    kernels = []
    for x in (student, teacher):
        x = F.normalize(x, p=2, dim=-1)
        c = x @ x.t()
        k = torch.zeros_like(c)
        for p in range(order + 1):
            k = k + math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * torch.pow(c, p)
        kernels.append(k)
    return F.mse_loss(*kernels)


def irg(student: Tensor, teacher: Tensor) -> Tensor:
    edges = []
    for x in (student, teacher):
        d = _squared_distances(x)
        d = d.masked_fill(torch.eye(len(d), dtype=torch.bool, device=d.device), 0)
        edges.append(d / d.max())
    return F.mse_loss(*edges)


def neighbour_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    delta = torch.abs(student - teacher)
    return torch.mean((delta[:-1] * delta[1:]).sum(1))


def nkd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 1.0, gamma: float = 1.5) -> Tensor:
    """NKD (arXiv 2303.13005). The authors pick the others out by a mask of booleans, which torch.compile cannot; here
    the label gets a logit of -1e9, as others write it: faster, also in eager mode."""
    label = target[:, None]
    log_p = F.log_softmax(student, dim=1).gather(1, label)
    p = F.softmax(teacher, dim=1).gather(1, label)
    labelled = torch.zeros_like(student).scatter(1, label, 1).bool()
    rest_s, rest_t = ((x / temperature).masked_fill(labelled, -1e9) for x in (student, teacher))
    others = (F.softmax(rest_t, dim=1) * F.log_softmax(rest_s, dim=1)).sum(1).mean()
    return -(p * log_p).mean() - gamma * temperature**2 * others


def dist(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0) -> Tensor:
    """DIST (arXiv 2205.10536)."""
    q_s, q_t = F.softmax(student / tau, dim=1), F.softmax(teacher / tau, dim=1)
    return tau**2 * (beta * _uncorrelated(q_s, q_t) + gamma * _uncorrelated(q_s.t(), q_t.t()))


def _uncorrelated(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)).mean()


def mlld(student: Tensor, teacher: Tensor) -> Tensor:
    """Multi-level logit distillation (CVPR 2023) of one view, with the masks kept on the device."""
    p = F.softmax(teacher, dim=1)
    confidence = p.max(1).values, p.sum(0)
    rows, classes = (x.le(x.quantile(0.5)).to(x.dtype).mean() for x in confidence)
    total = student.new_zeros(())
    for temperature in (4.0, 3.0, 5.0, 2.0, 6.0):
        q_s, q_t = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
        batch = (q_t @ q_t.t() - q_s @ q_s.t()).pow(2).sum() / len(student)
        of_classes = (q_t.t() @ q_t - q_s.t() @ q_s).pow(2).sum() / student.shape[1]
        total = total + rows * (kd(student, teacher, temperature) + batch) + classes * of_classes
    return total


def cwd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Channel-wise distillation (arXiv 2011.13256)."""
    rows_s, rows_t = (x.reshape(-1, x.shape[2] * x.shape[3]) / temperature for x in (student, teacher))
    log_q_t, log_q_s = F.log_softmax(rows_t, dim=1), F.log_softmax(rows_s, dim=1)
    return (log_q_t.exp() * (log_q_t - log_q_s)).sum() * temperature**2 / len(rows_s)


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
