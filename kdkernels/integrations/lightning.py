"""Distillation with Lightning. It needs the extra "lightning": pip install '.[lightning]'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..training.checks import check_optimizer
from ..training.defaults import default_optimizer, default_scheduler
from ..training.distillation import Distillation, DistillationOutput
from .relational import whole_batches

try:
    from lightning import LightningModule
except ImportError as error:
    raise ImportError(
        f"kdkernels.integrations.lightning needs the extra lightning: pip install '.[lightning]' ({error})"
    ) from error


class DistillationModule(LightningModule):
    """``Trainer(max_epochs=...).fit(DistillationModule(distillation), loader)``.

    Args:
        distillation: the module to train. The student and the method's own heads are trained, moved and saved; the
            teacher is only moved. ``distillation.student`` is the result.
        lr: for the default optimizer and schedule, which are those of ``kdkernels.training.fit``; for others override
            ``configure_optimizers`` (over ``self.parameters()``, which include the method's own).

    Batches are (images, target), for "corsd" (images, target, target_neg). Logs ``loss`` and its terms; in validation
    ``val_loss`` and, if each image has one row of logits, ``val_accuracy`` in percent.
    Read a checkpoint with ``DistillationModule.load_from_checkpoint(path, distillation=...)``.

    Without shuffling it ends with the same student as ``fit``. A shuffling loader has other orders here from the second
    epoch on, and an incomplete last window of accumulation counts less than in ``fit``.

    Raises:
        TypeError: distillation is not a Distillation.
        ValueError: when training starts, for accumulate_grad_batches with a method that compares the rows of a batch
            (sp, mlkd), and for an optimizer that misses the method's heads. Several processes are fine: rows are
            compared over all processes.
    """

    def __init__(self, distillation: Distillation, lr: float = 0.05) -> None:
        super().__init__()
        if not isinstance(distillation, Distillation):
            raise TypeError(f"DistillationModule needs a Distillation, got {type(distillation).__name__}")
        self.distillation, self.lr = distillation, lr

    def forward(self, images: Tensor) -> Tensor:
        return self.distillation.student(images)

    def on_fit_start(self) -> None:
        whole_batches(self.distillation, self.trainer.accumulate_grad_batches, self.trainer.world_size)
        self.distillation.train()  # Lightning leaves modes alone, and in eval mode a method does not mix images

    def on_train_start(self) -> None:
        check_optimizer(self.distillation, *self.trainer.optimizers)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self.distillation.schedule(self.global_step / max(int(self.trainer.estimated_stepping_batches), 1))
        result: DistillationOutput = self.distillation(*batch)
        self.log_dict({"loss": result.loss.detach(), **result.terms}, batch_size=len(batch[0]))
        return result.loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        result: DistillationOutput = self.distillation(*batch)
        self.log("val_loss", result.loss, batch_size=len(batch[0]))
        target = batch[1]
        if len(result.logits) == len(target):
            accuracy = 100 * (result.logits.argmax(-1) == target).float().mean()
            self.log("val_accuracy", accuracy, batch_size=len(target), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = default_optimizer(self.parameters(), self.lr)
        scheduler = default_scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
