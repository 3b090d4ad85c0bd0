"""ICKD: CE + weight * L_ICKD on the last stage, the student's channels projected to the teacher's."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ...batch_norm import BatchNorm2d, set_group
from ...ickd_loss import ickd_loss
from ...ops.checks import check_weight
from .base import WARMUP, Batch, Method, Outputs


class ICKD(Method):
    """Liu et al. 2021. The projection, a 1 x 1 convolution and batch norm, trains with the student and is dropped."""

    stages = "last"
    maps = True
    needs_widths = True
    needs_classes = False

    def __init__(self, weight: float = 2.5, warmup: float = WARMUP) -> None:
        super().__init__(warmup)
        check_weight("ICKD", weight=weight)
        self.weight = weight
        self.projection: nn.Module | None = None

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        own, target = (x.features[0].shape[1] for x in (student, teacher))
        projection = nn.Sequential(nn.Conv2d(own, target, 1, bias=False), BatchNorm2d(target))
        self.projection = projection.to(student.logits.device)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        assert self.projection is not None
        set_group(self.projection, self.group)
        return {
            "ce": F.cross_entropy(student.logits, batch.target),
            "ickd": self.weighted(ickd_loss(self.projection(student.features[0]), teacher.features[0])),
        }
