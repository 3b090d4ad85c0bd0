"""The losses of Knowledge-Distillation-Zoo (github.com/AberHu/Knowledge-Distillation-Zoo): ``SoftTarget`` and ``SP``.

from kdkernels.compat.kd_zoo import SP, SoftTarget        # was: from kd_losses import ...
"""

from __future__ import annotations

from torch import Tensor, nn

from .scales import kl_per_sample, published_sp


class SoftTarget(nn.Module):
    """``SoftTarget(T)(out_s, out_t)``: T^2 KL(softmax(out_t / T) || softmax(out_s / T)), summed, over N; a scalar.

    Quirk: the softmax is over dimension 1 and the sum over everything else, so (N, C, H, W) gives H W times the mean
    over pixels: use ``kdkernels.kd_loss(out_s, out_t, temperature=T, class_dim=1)``.
    """

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        return kl_per_sample(out_s, out_t, self.T)


class SP(nn.Module):
    """``SP()(fm_s, fm_t)``: L_SP = ||G_t - G_s||_F^2 / B^2 of one pair of features (B, ...); a scalar.

    Quirk: one pair per call; the library's trainer averages three stages. Use ``kdkernels.sp_loss`` on lists, which
    sums, or averages with ``layer_reduction="mean"``.
    """

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        return published_sp([fm_s], [fm_t])
