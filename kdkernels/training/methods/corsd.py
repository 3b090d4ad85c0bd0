"""CORSD: CE over all images of the triplets + the network's own deepest stage as the teacher of the others."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from ...batch_norm import set_group
from ...corsd_loss import CORSDLoss
from ..triplets import triplet_labels
from .base import Batch, Method, Outputs


class CORSD(Method):
    """Yu et al. 2023, on every stage; there is no other teacher. Batches are triplets, see ``training.triplets``."""

    stages = "all"
    maps = True
    most_layers = 4  # as the paper's networks have; each has networks of its own
    needs_teacher = False
    needs_widths = True
    triplets = True
    scales: ClassVar[dict[str, str]] = {"corsd": "the weights of kdkernels.CORSDLoss, options"}

    def __init__(self, **options: Any) -> None:
        """Options are those of ``CORSDLoss``: its weights, temperature, margin, detach_deepest."""
        super().__init__()
        self.options = options
        self.loss: CORSDLoss | None = None

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        channels = [x.shape[1] for x in student.features]
        self.loss = CORSDLoss(channels, student.logits.shape[1], **self.options)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert self.loss is not None
        if batch.target_neg is None:  # in evaluation images come one by one
            return {"ce": F.cross_entropy(student.logits, batch.target)}
        set_group(self.loss, self.group)
        labels = triplet_labels(batch.target, batch.target_neg)
        corsd = self.loss(student.features, batch.target, batch.target_neg, student.logits)
        return {"ce": F.cross_entropy(student.logits, labels), "corsd": corsd}
