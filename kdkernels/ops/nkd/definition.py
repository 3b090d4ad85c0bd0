"""nkd as on a board: differentiable PyTorch, the oracle of the tests. Source: arXiv 2303.13005, eq. 7.

row = -p_t,y log p_s,y  -  gamma T^2 sum over k != y of q^_t,k log q^_s,k
p = softmax(z);   q^ = softmax(z / T) over the classes but the label y;   s student, t teacher
The second term is 0 where the teacher gives the other classes nothing: all of them -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import LabelledRows


def nkd(x: LabelledRows) -> Tensor:
    dtype = compute_dtype(x.student, x.teacher)
    counts = x.target != x.ignore_index
    label = x.target.where(counts, 0)[:, None]
    s = x.student.to(dtype).masked_fill(~counts[:, None], 0)  # an ignored row has no part in the gradient
    t = x.teacher.detach().to(dtype).masked_fill(~counts[:, None], 0)
    weight, log_p = t.softmax(1).gather(1, label), s.log_softmax(1).gather(1, label)
    rows = -torch.where(weight == 0, 0, weight * log_p)[:, 0]
    if s.shape[1] > 1:
        others = torch.ones_like(s, dtype=torch.bool).scatter(1, label, False)
        nothing = (t.masked_fill(~others, -math.inf) == -math.inf).all(1, keepdim=True)
        z_s, z_t = (z.masked_fill(~others, -math.inf).masked_fill(nothing, 0) / x.temperature for z in (s, t))
        log_s, q_t = z_s.log_softmax(1), z_t.softmax(1).masked_fill(nothing, 0)
        rows = rows - x.gamma * x.temperature**2 * (q_t * log_s.masked_fill(q_t == 0, 0)).sum(1)
    rows = rows.masked_fill(~counts, 0)
    if x.reduction == "none":
        return rows
    return rows.sum() / (counts.sum().clamp(min=1) if x.reduction == "mean" else 1)
