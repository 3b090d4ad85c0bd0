"""multi_level as on a board: differentiable PyTorch, the oracle of the tests. Source: KD_ours.py of
Jin-Ying/Multi-Level-Logit-Distillation (Jin et al., CVPR 2023).

q = softmax(z / T), (N, C);   sum over the temperatures T of
    (w_T + w rho) T^2 mean over rows of KL(q_t || q_s)  +  w_batch rho / N |q_t q_t' - q_s q_s'|^2
                                                        +  w_class rho' / C |q_t' q_t - q_s' q_s|^2
rho: the share of rows whose largest p_t, p = softmax(z), is at most its quantile;  rho': of classes, by the sum of p_t
"""

from __future__ import annotations

from torch import Tensor

from ..checks import compute_dtype
from .op import Levels


def multi_level(x: Levels) -> Tensor:
    dtype = compute_dtype(x.student, x.teacher)
    s, t = x.student.to(dtype), x.teacher.detach().to(dtype)
    total = s[:0].sum()
    if len(s) == 0:
        return total
    p = t.softmax(1)
    rows, classes = (_share(confidence, x.quantile) for confidence in (p.amax(1), p.sum(0)))
    for temperature, weight in zip(x.temperatures, x.weights, strict=True):
        log_s, log_t = ((z / temperature).log_softmax(1) for z in (s, t))
        q_s, q_t = log_s.exp(), log_t.exp()
        kl = (q_t * (log_t - log_s).masked_fill(q_t == 0, 0)).sum(1).mean()
        batch_gram, class_gram = q_t @ q_t.t() - q_s @ q_s.t(), q_t.t() @ q_t - q_s.t() @ q_s
        total = total + (weight + x.masked_weight * rows) * temperature**2 * kl
        total = total + x.batch_weight * rows * batch_gram.square().sum() / s.shape[0]
        total = total + x.class_weight * classes * class_gram.square().sum() / s.shape[1]
    return total


def _share(confidence: Tensor, quantile: float) -> Tensor:
    """Interpolated or not, the quantile parts the values in the same way."""
    return (confidence <= confidence.quantile(quantile)).to(confidence.dtype).mean()
