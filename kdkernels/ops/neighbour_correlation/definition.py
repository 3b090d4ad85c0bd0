"""neighbour_correlation as on a board: differentiable PyTorch, the oracle of the tests. Source: RepDistiller's CC.py.

delta_i = |s_i - t_i|;   L = mean over i of <delta_i, delta_(i + 1)>
"""

from __future__ import annotations

from torch import Tensor

from ..checks import compute_dtype
from .op import NeighbourRows


def neighbour_correlation(x: NeighbourRows) -> Tensor:
    dtype = compute_dtype(x.student, x.teacher)
    delta = (x.student.to(dtype) - x.teacher.detach().to(dtype)).abs()
    return (delta[:-1] * delta[1:]).sum() / x.pairs
