"""The losses of Knowledge-Distillation-Zoo (github.com/AberHu/Knowledge-Distillation-Zoo, kd_losses).

from kdkernels.compat.kd_zoo import SP, SoftTarget        # was: from kd_losses import ...
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cc_loss import cc_loss
from ..feature_maps import energy
from ..fsp_loss import fsp_loss
from ..irg_loss import irg_loss
from ..pkt_loss import pkt_loss
from ..rkd_loss import rkd_loss
from .scales import in_compute_dtype, kl_per_sample, mean, published_nst, published_sp, warn_of_trained_teacher


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


class DML(nn.Module):
    """``DML()(out1, out2)``: KL(softmax(out2) || softmax(out1)), summed, over N; a scalar. out2 is a constant."""

    def forward(self, out1: Tensor, out2: Tensor) -> Tensor:
        return kl_per_sample(out1, out2, 1.0)


class BSS(nn.Module):
    """``BSS(T)(attacked_out_s, attacked_out_t)``: ``SoftTarget`` without T^2. The attack is the library's own."""

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, attacked_out_s: Tensor, attacked_out_t: Tensor) -> Tensor:
        return kl_per_sample(attacked_out_s, attacked_out_t, self.T, scale_by_t2=False)


class SP(nn.Module):
    """``SP()(fm_s, fm_t)``: L_SP = ||G_t - G_s||_F^2 / B^2 of one pair of features (B, ...); a scalar.

    Quirk: one pair per call; the library's trainer averages three stages. Use ``kdkernels.sp_loss`` on lists, which
    sums, or averages with ``layer_reduction="mean"``.
    """

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        return published_sp([fm_s], [fm_t])


class RKD(nn.Module):
    """``RKD(w_dist, w_angle)(feat_s, feat_t)`` of features (B, d): ``kdkernels.rkd_loss`` with these weights."""

    def __init__(self, w_dist: float, w_angle: float) -> None:
        super().__init__()
        self.w_dist, self.w_angle = w_dist, w_angle

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        warn_of_trained_teacher(feat_t)
        return rkd_loss(feat_s, feat_t, distance_weight=self.w_dist, angle_weight=self.w_angle)


class PKTCosSim(nn.Module):
    """``PKTCosSim()(feat_s, feat_t)`` of features (B, d): ``kdkernels.pkt_loss``.

    Quirk: eps is 1e-6, elsewhere 1e-7.
    """

    def forward(self, feat_s: Tensor, feat_t: Tensor, eps: float = 1e-6) -> Tensor:
        warn_of_trained_teacher(feat_t)
        return pkt_loss(feat_s, feat_t, eps=eps)


class CC(nn.Module):
    """``CC(gamma, P_order)(feat_s, feat_t)`` of features (B, d): ``kdkernels.cc_loss`` with gamma and order."""

    def __init__(self, gamma: float, P_order: int) -> None:
        super().__init__()
        self.gamma, self.P_order = gamma, P_order

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        warn_of_trained_teacher(feat_t)
        return cc_loss(feat_s, feat_t, gamma=self.gamma, order=self.P_order)


class AT(nn.Module):
    """``AT(p)(fm_s, fm_t)``: attention transfer of a pair of maps (B, C, H, W) of one size; a scalar.

    Quirk: the sum over the channels of |f|^p is divided by its norm plus 1e-6; without it: ``kdkernels.at_loss``.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        warn_of_trained_teacher(fm_t)
        return mean((self.attention_map(fm_s) - self.attention_map(fm_t.detach())).square())

    def attention_map(self, fm: Tensor, eps: float = 1e-6) -> Tensor:
        am = energy(fm, self.p)[:, None] * fm.shape[1]
        return am / (torch.linalg.vector_norm(am, dim=(2, 3), keepdim=True) + eps)


class NST(nn.Module):
    """``NST()(fm_s, fm_t)``: neuron selectivity transfer of a pair of maps (B, C, H, W): ``kdkernels.nst_loss``."""

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        return published_nst([fm_s], [fm_t])[0]


class FSP(nn.Module):
    """``FSP()(fm_s1, fm_s2, fm_t1, fm_t2)``: the flow from the first to the second map (B, C, H, W); a scalar.

    ``kdkernels.fsp_loss([fm_s1, fm_s2], [fm_t1, fm_t2])``.
    """

    def forward(self, fm_s1: Tensor, fm_s2: Tensor, fm_t1: Tensor, fm_t2: Tensor) -> Tensor:
        for teacher in (fm_t1, fm_t2):
            warn_of_trained_teacher(teacher)
        return fsp_loss([fm_s1, fm_s2], [fm_t1, fm_t2])


class IRG(nn.Module):
    """``IRG(w_irg_vert, w_irg_edge, w_irg_tran)(irg_s, irg_t)``: the instance relationship graph; a scalar.

    irg_s, irg_t: two maps (B, C, H, W) of neighbouring stages, a feature (B, d) and logits (B, C) of one network. The
    edges are the mean of ``kdkernels.irg_loss`` of the feature and the maps; vertices (the mean squared difference of
    the logits) and transformations (each sample's distance between its two maps) are plain PyTorch.

    Quirk: each kind of distance is divided by the largest of the batch. Quirk: of two maps, the first is pooled if it
    is larger and the second's channels are averaged in pairs if it has more.
    """

    def __init__(self, w_irg_vert: float, w_irg_edge: float, w_irg_tran: float) -> None:
        super().__init__()
        self.w_irg_vert, self.w_irg_edge, self.w_irg_tran = w_irg_vert, w_irg_edge, w_irg_tran

    def forward(self, irg_s: Sequence[Tensor], irg_t: Sequence[Tensor]) -> Tensor:
        for teacher in irg_t:
            warn_of_trained_teacher(teacher)
        irg_t = [teacher.detach() for teacher in irg_t]
        fm_s1, fm_s2, feat_s, out_s = irg_s
        fm_t1, fm_t2, feat_t, out_t = irg_t
        edges = [irg_loss(s, t) for s, t in ((feat_s, feat_t), (fm_s1, fm_t1), (fm_s2, fm_t2))]
        vertices = mean((in_compute_dtype(out_s) - in_compute_dtype(out_t)).square())
        transformations = mean((_between(fm_s1, fm_s2) - _between(fm_t1, fm_t2)).square())
        return self.w_irg_vert * vertices + self.w_irg_edge * sum(edges) / 3 + self.w_irg_tran * transformations


def _between(first: Tensor, second: Tensor) -> Tensor:
    """Each sample's squared distance between two maps, over the batch's largest."""
    first, second = in_compute_dtype(first), in_compute_dtype(second)
    if first.shape[2] > second.shape[2]:
        first = F.adaptive_avg_pool2d(first, (second.shape[2], second.shape[3]))
    if first.shape[1] < second.shape[1]:
        second = (second[:, 0::2] + second[:, 1::2]) / 2
    distances = (first - second).square().flatten(1).sum(1).clamp_min(1e-12)
    return distances / distances.max() if len(distances) else distances
