"""Distillation with transformers' ``Trainer``. It needs the extra "hf": pip install '.[hf]'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..training.checks import check_optimizer
from ..training.distillation import Distillation
from .relational import whole_batches

try:
    from transformers import Trainer, TrainingArguments
except ImportError as error:
    raise ImportError(f"kdkernels.integrations.hf needs the extra hf: pip install '.[hf]' ({error})") from error


class Logits(nn.Module):
    """A transformers model as the network that ``Distillation`` needs: it returns only the logits.

    ``Logits(model)(x)`` is ``model(x).logits``, for a dict of tensors ``model(**x).logits``. Names of its layers begin
    with "model.".
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        output = self.model(**x) if isinstance(x, Mapping) else self.model(x)
        return output.logits


class DistillationTrainer(Trainer):
    """``DistillationTrainer(distillation, args, train_dataset=...)``: transformers' Trainer on a ``Distillation``.

    Args:
        distillation: the module to train. The student ("student." in checkpoints) and the method's own heads
            ("method.") are trained, moved and saved; the teacher is only moved. ``distillation.student`` is the result.
        args: TrainingArguments. remove_unused_columns is set to False, so the dataset must have only what the networks
            take.
        options: those of ``Trainer``.

    Batches are dicts with ``labels``, for "corsd" also ``labels_neg``. Everything else in them goes to both networks:
    one tensor as it is, several as a dict (for ``Logits``; methods that mix or rotate images need one tensor). The
    predictions of ``evaluate`` and ``predict`` are the student's logits, and ``eval_loss`` is the method's loss.

    Raises:
        TypeError: distillation is not a Distillation.
        ValueError: gradient accumulation with a method that compares the rows of a batch (sp, mlkd), or several GPUs in
            one process, or an optimizer that misses the method's heads. Several processes are fine: rows are compared
            over all processes.
    """

    def __init__(self, distillation: Distillation, args: TrainingArguments | None = None, **options: Any) -> None:
        if not isinstance(distillation, Distillation):
            raise TypeError(f"DistillationTrainer needs a Distillation, got {type(distillation).__name__}")
        super().__init__(distillation, args, **options)
        self._distillation = distillation  # self.model may become a wrapper of it
        if self.optimizer is not None:
            check_optimizer(distillation, self.optimizer)
        whole_batches(distillation, self.args.gradient_accumulation_steps, self.args.world_size)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"DistillationTrainer uses one GPU per process, and this process has {self.args.n_gpu}: start it with "
                "torchrun --nproc-per-node, or set CUDA_VISIBLE_DEVICES"
            )
        self.args.remove_unused_columns = False  # columns are the networks', of which the Trainer knows nothing
        self.label_names = self.args.label_names or ["labels"]
        self.loss_is_scaled_for_ga = False  # the loss is a mean over its micro-batch

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training and self.state.max_steps:
            self._distillation.schedule(self.state.global_step / self.state.max_steps)
        inputs = dict(inputs)
        target, target_neg = inputs.pop(self.label_names[0]), inputs.pop("labels_neg", None)
        result = model(next(iter(inputs.values())) if len(inputs) == 1 else inputs, target, target_neg)
        return (result.loss, {"loss": result.loss, "logits": result.logits}) if return_outputs else result.loss
