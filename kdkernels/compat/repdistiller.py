"""RepDistiller's losses (github.com/HobbitLong/RepDistiller, distiller_zoo).

    from kdkernels.compat.repdistiller import DistillKL, RKDLoss, Similarity        # was: from distiller_zoo import ...

or all of them at once, before ``distiller_zoo``'s names are imported elsewhere:

    import kdkernels.compat.repdistiller as ours; ours.patch()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..fsp_loss import fsp_loss
from ..ft_loss import ft_loss
from ..pkt_loss import pkt_loss
from ..rkd_loss import rkd_loss
from .patching import Patch
from .scales import (
    in_compute_dtype,
    kl_per_sample,
    mean,
    published_at,
    published_nst,
    published_sp,
    signed_unit_map,
    warn_of_trained_teacher,
)


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


class RKDLoss(nn.Module):
    """``RKDLoss(w_d, w_a)(f_s, f_t)``: w_d times RKD's distances plus w_a times its angles, of features (B, ...).

    ``kdkernels.rkd_loss(f_s, f_t, distance_weight=w_d, angle_weight=w_a)``.
    """

    def __init__(self, w_d: float = 25, w_a: float = 50) -> None:
        super().__init__()
        self.w_d, self.w_a = w_d, w_a

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        warn_of_trained_teacher(f_t)
        return rkd_loss(f_s, f_t, distance_weight=self.w_d, angle_weight=self.w_a)


class PKT(nn.Module):
    """``PKT()(f_s, f_t)``: probabilistic knowledge transfer of features (B, d), mean over the B^2 pairs.

    ``kdkernels.pkt_loss(f_s, f_t)``.
    """

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return self.cosine_similarity_loss(f_s, f_t)

    @staticmethod
    def cosine_similarity_loss(output_net: Tensor, target_net: Tensor, eps: float = 1e-7) -> Tensor:
        warn_of_trained_teacher(target_net)
        return pkt_loss(output_net, target_net, eps=eps)


class Correlation(nn.Module):
    """``Correlation()(f_s, f_t)``: the mean over i < B - 1 of sum over d of |s - t|[i] |s - t|[i + 1]; (B, d) each.

    Plain PyTorch, since it is elementwise. The gradient flows to both: RepDistiller trains an embedding of the
    teacher's features through it. For Peng et al.'s formula see ``kdkernels.cc_loss``.
    """

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        delta = (in_compute_dtype(f_s) - in_compute_dtype(f_t)).abs()
        return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)


class Attention(nn.Module):
    """``Attention(p)([f_s, ...], [f_t, ...])``: attention transfer, one scalar for each pair of maps (B, C, H, W).

    Quirk: a list, to be summed: use ``kdkernels.at_loss(g_s, g_t)``. Quirk: f^p and not |f|^p, so that odd powers keep
    signs; only even ones have kernels. Quirk: if the lists differ in length, the shorter one counts.
    """

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        self.p = p

    def forward(self, g_s: Iterable[Tensor], g_t: Iterable[Tensor]) -> list[Tensor]:
        return published_at(g_s, g_t, self.p)

    def at_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return published_at([f_s], [f_t], self.p)[0]


class FactorTransfer(nn.Module):
    """``FactorTransfer(p1, p2)(f_s, f_t)``: the mean of |u_s - u_t|^p2 of the unit maps of f^p1, f: (B, C, H, W).

    Quirk: f^p1 and not |f|^p1, and (u_s - u_t)^p2 for p2 other than 1. Only even p1, with p2 1 or 2, have kernels:
    ``kdkernels.ft_loss(f_s, f_t)``.
    """

    def __init__(self, p1: float = 2, p2: float = 1) -> None:
        super().__init__()
        self.p1, self.p2 = p1, p2

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return self.factor_loss(f_s, f_t)

    def factor_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        warn_of_trained_teacher(f_t)
        if self.p1 % 2 == 0 and self.p2 in (1, 2):
            return ft_loss(f_s, f_t, p1=self.p1, p2=self.p2)
        difference = signed_unit_map(f_s, f_t, self.p1) - signed_unit_map(f_t.detach(), f_s, self.p1)
        return mean(difference.abs() if self.p2 == 1 else difference.pow(self.p2))


class NSTLoss(nn.Module):
    """``NSTLoss()([f_s, ...], [f_t, ...])``: neuron selectivity transfer, one scalar for each pair (B, C, H, W).

    Quirk: a list, to be summed: use ``kdkernels.nst_loss(g_s, g_t)``. Quirk: if the lists differ in length, the shorter
    one counts.
    """

    def forward(self, g_s: Iterable[Tensor], g_t: Iterable[Tensor]) -> list[Tensor]:
        return published_nst(g_s, g_t)

    def nst_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return published_nst([f_s], [f_t])[0]


class FSP(nn.Module):
    """``FSP(s_shapes, t_shapes)(g_s, g_t)``: the flow of the solution procedure through n maps (B, C, H, W).

    Quirk: a list of n - 1 scalars, to be summed: use ``kdkernels.fsp_loss(g_s, g_t)``.
    """

    def __init__(self, s_shapes: Sequence[Sequence[int]], t_shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if len(s_shapes) != len(t_shapes) or any(s[1] != t[1] for s, t in zip(s_shapes, t_shapes, strict=True)):
            raise ValueError(
                f"FSP: both networks must have as many maps with as many channels, got {list(map(tuple, s_shapes))} "
                f"and {list(map(tuple, t_shapes))}"
            )

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        if len(g_s) < 2:
            return []
        for teacher in g_t:
            warn_of_trained_teacher(teacher)
        return list(fsp_loss(g_s, g_t, layer_reduction="none").unbind())


_PATCH = Patch(
    "distiller_zoo",
    {
        "DistillKL": {"(T)": DistillKL},
        "Similarity": {"()": Similarity},
        "RKDLoss": {"(w_d=25, w_a=50)": RKDLoss},
        "PKT": {"()": PKT},
        "Correlation": {"()": Correlation},
        "Attention": {"(p=2)": Attention},
        "FactorTransfer": {"(p1=2, p2=1)": FactorTransfer},
        "NSTLoss": {"()": NSTLoss},
        "FSP": {"(s_shapes, t_shapes)": FSP},
    },
    {
        "HintLoss": "a mean squared error, which PyTorch has",
        "VIDLoss": "its convolutions are its time",
        "ABLoss": "elementwise; used before training alone",
        "KDSVD": "its singular value decompositions are its time",
    },
)


def patch() -> None:
    """Replace RepDistiller's classes by ours in ``distiller_zoo``, and print what was replaced and what was left.

    Call it before ``from distiller_zoo import ...``: names that were imported earlier are left, and printed.
    """
    _PATCH.apply()


def unpatch() -> None:
    """Put RepDistiller's own classes back."""
    _PATCH.undo()
