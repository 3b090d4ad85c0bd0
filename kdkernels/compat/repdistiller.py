"""RepDistiller's losses (github.com/HobbitLong/RepDistiller, distiller_zoo): ``DistillKL`` and ``Similarity``.

from kdkernels.compat.repdistiller import DistillKL, Similarity        # was: from distiller_zoo import ...
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from .scales import kl_per_sample, published_sp


class DistillKL(nn.Module):
    """``DistillKL(T)(y_s, y_t)``: T^2 KL(softmax(y_t / T) || softmax(y_s / T)), summed, over N; a scalar.

    Quirk: the softmax is over dimension 1 and the sum over everything else, so (N, C, H, W) gives H W times the mean
    over pixels, and (N, L, C) a softmax over L: use ``kdkernels.kd_loss(y_s, y_t, temperature=T, class_dim=...)``.
    """

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return kl_per_sample(y_s, y_t, self.T)


class Similarity(nn.Module):
    """``Similarity()([f_s, ...], [f_t, ...])``: L_SP = ||G_t - G_s||_F^2 / B^2 of each pair of features (B, ...).

    Quirk: a list of tensors of shape (1,), one per pair, to be summed: use ``kdkernels.sp_loss(g_s, g_t)``, which sums
    them in one launch. Quirk: if the lists differ in length, the shorter one counts.
    """

    def forward(self, g_s: Iterable[Tensor], g_t: Iterable[Tensor]) -> list[Tensor]:
        return [self.similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def similarity_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return published_sp([f_s], [f_t]).view(1)
