"""MLKD: CE on the upright images + correlation, supervised and alignment terms over the rotated views of each."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...mlkd_loss import MLKDLoss
from ...ops.checks import check_weight
from ..layouts import Layout, layout_pair, pooled
from ..views import rotate_views
from .base import WARMUP, Batch, Method, Outputs


class MLKD(Method):
    """Ding et al. 2021, on the pooled output of the last stage. Its heads train with the student and are dropped.

    ``layout`` says what the features' axes are, "nchw", "nhwc", "nlc" (tokens), "ncl" or "nc", or a pair of them for
    student and teacher; None guesses, and raises where that is not clear. All axes but n and c are averaged.
    """

    stages = "last"
    needs_widths = True
    needs_classes = False
    relational = True

    def __init__(
        self,
        correlation_weight: float = 50.0,
        supervised_weight: float = 1.0,
        alignment_weight: float = 20.0,
        views: int = 4,
        layout: Layout = None,
        warmup: float = WARMUP,
    ) -> None:
        super().__init__(warmup)
        self.weights: dict[str, Any] = {
            "correlation_weight": correlation_weight,
            "supervised_weight": supervised_weight,
            "alignment_weight": alignment_weight,
        }
        check_weight("MLKD", **self.weights)
        self.views = views
        self.layouts = layout_pair(layout, "MLKD")
        self.loss: MLKDLoss | None = None

    def set_option(self, option: str, value: float) -> None:
        assert self.loss is not None
        if option == "supervised_weight" and value and self.loss.e_s is None:
            raise ValueError("MLKD: supervised_weight was 0 when the heads were made: let its schedule begin above 0")
        self.loss.options[option] = value

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        (s,), (t,) = self.widths(student, teacher)
        self.loss = MLKDLoss(s, t, views=self.views, **self.weights)

    def widths(self, student: Outputs, teacher: Outputs | None) -> tuple[list[int], list[int]]:
        s, t = self._pooled(student, teacher)
        return [s.shape[1]], [t.shape[1]]

    @property
    def fixed_views(self) -> int:
        return self.views

    def own_rows(self, images: int) -> slice:
        return slice(None, None, self.views)

    def prepare(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        return Batch(rotate_views(images, self.views), target)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        assert self.loss is not None
        views = len(student.logits) // max(len(batch.target), 1)
        terms = {"ce": F.cross_entropy(student.logits[::views], batch.target)}
        if views == self.views:  # in evaluation images come as they are
            self.loss.group = self.group
            dtype = next(self.loss.parameters()).dtype  # the networks may be in two dtypes
            s, t = (x.to(dtype) for x in self._pooled(student, teacher))
            terms["mlkd"] = self.grown * self.loss(s, t, batch.target)
        return terms

    def _pooled(self, student: Outputs, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        features = (student.features[0], teacher.features[0])
        s, t = (pooled(x, layout, "MLKD") for x, layout in zip(features, self.layouts, strict=True))
        return s, t
