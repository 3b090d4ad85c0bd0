"""RKD, PKT, CC and IRG: CE + weight * the loss on the last stage, averaged over positions as in the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ...cc_loss import cc_loss
from ...irg_loss import irg_loss
from ...ops.checks import check_weight
from ...pkt_loss import pkt_loss
from ...rkd_loss import rkd_loss
from ..layouts import Layout, layout_pair, pooled
from .base import WARMUP, Batch, Method, Outputs


class _Relational(Method):
    """CE + weight * a loss of two (B, d) features; ``layout`` says what their axes are, as in MLKD."""

    stages = "last"
    relational = True
    name: ClassVar[str]
    loss: ClassVar[Callable[..., Tensor]]

    def __init__(self, weight: float, layout: Layout, warmup: float) -> None:
        super().__init__(warmup)
        check_weight(type(self).__name__, weight=weight)
        self.weight, self.layouts = weight, layout_pair(layout, type(self).__name__)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        features = (student.features[0], teacher.features[0])
        s, t = (pooled(x, axes, type(self).__name__) for x, axes in zip(features, self.layouts, strict=True))
        return {
            "ce": F.cross_entropy(student.logits, batch.target),
            self.name: self.weighted(type(self).loss(s, t, group=self.group)),
        }


class RKD(_Relational):
    """Park et al. 2019, with the distances' weight 25 and the angles' 50 inside the loss."""

    name, loss = "rkd", rkd_loss

    def __init__(self, weight: float = 1.0, layout: Layout = None, warmup: float = WARMUP) -> None:
        super().__init__(weight, layout, warmup)


class PKT(_Relational):
    """Passalis & Tefas 2018, with RepDistiller's weight."""

    name, loss = "pkt", pkt_loss

    def __init__(self, weight: float = 30000.0, layout: Layout = None, warmup: float = WARMUP) -> None:
        super().__init__(weight, layout, warmup)


class CC(_Relational):
    """Peng et al. 2019, with KD-Zoo's weight."""

    name, loss = "cc", cc_loss

    def __init__(self, weight: float = 100.0, layout: Layout = None, warmup: float = WARMUP) -> None:
        super().__init__(weight, layout, warmup)


class IRG(_Relational):
    """The edges of Liu et al. 2019, with KD-Zoo's weight of them."""

    name, loss = "irg", irg_loss

    def __init__(self, weight: float = 5.0, layout: Layout = None, warmup: float = WARMUP) -> None:
        super().__init__(weight, layout, warmup)
