"""correlation as on a board: differentiable PyTorch, the oracle of the tests. Source: MLKD (arXiv 2012.00573).

S[a, j] = cos(view row a, base row j) of the student, T of the teacher;  one view: every row and all the others
L = mean over a of KL(softmax_j(T / tau) || softmax_j(S / tau))
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gram.definition import cosine_similarity
from ..softmax_kl import Rows
from ..softmax_kl.definition import softmax_kl
from .op import ViewRows


def correlation(x: ViewRows) -> Tensor:
    s, t = (_similarities(rows, x.options.views) for rows in (x.student, x.teacher))
    return softmax_kl(Rows(s, t, temperature=x.options.temperature, reduction=x.options.reduction))


def _similarities(rows: Tensor, views: int) -> Tensor:
    if views == 1:
        others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        return cosine_similarity(rows, rows)[others].view(len(rows), len(rows) - 1)
    images = rows.unflatten(0, (-1, views))
    return cosine_similarity(images[:, 1:].flatten(0, 1), images[:, 0])
