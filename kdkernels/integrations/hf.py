"""Distillation with transformers' ``Trainer``. It needs the extra "hf": pip install '.[hf]'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..training.checks import check_optimizer
from ..training.distillation import Distillation
from ..training.sequence import SequenceDistillation, counted_tokens
from ..training.sequence_data import SequenceCollator
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
        _one_gpu(self)
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


class SequenceDistillationTrainer(Trainer):
    """``SequenceDistillationTrainer(distillation, args, train_dataset=..., data_collator=...)``: language models.

    Args:
        distillation: a ``SequenceDistillation``. Its student is the model that is trained, saved and loaded, as in any
            other training of it; a live teacher is only moved to the device.
        args: TrainingArguments. remove_unused_columns is set to False and prediction_loss_only to True: ``evaluate``
            gives the loss, as there are no logits.
        options: those of ``Trainer``, whose data_collator is by default a ``SequenceCollator``.

    A step's loss is the sum over the tokens that count, in all its micro-batches and processes, divided by their number
    (transformers' num_items_in_batch): four micro-batches are one batch.

    Raises:
        TypeError: distillation is not a SequenceDistillation.
        ValueError: several GPUs in one process; label smoothing.
    """

    def __init__(
        self, distillation: SequenceDistillation, args: TrainingArguments | None = None, **options: Any
    ) -> None:
        if not isinstance(distillation, SequenceDistillation):
            raise TypeError(
                f"SequenceDistillationTrainer needs a SequenceDistillation, got {type(distillation).__name__}"
            )
        super().__init__(distillation.student, args, **{"data_collator": SequenceCollator(), **options})
        _one_gpu(self)
        if self.args.label_smoothing_factor:
            raise ValueError(
                "SequenceDistillationTrainer: label_smoothing_factor belongs to transformers' own loss; give "
                "label_smoothing to SequenceDistillation"
            )
        self.distillation = distillation
        self.args.remove_unused_columns = False  # a cached teacher's columns are no arguments of the model
        self.args.prediction_loss_only = True
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # the loss is divided by a step's tokens
        teacher = distillation.teacher
        if isinstance(teacher, nn.Module) and not hasattr(teacher, "hf_device_map"):
            teacher.to(self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """A step's micro-batches, and how many tokens count in them.

        For some models (GPT-2) transformers also counts first tokens, which nothing predicts.
        """
        samples = list(islice(epoch_iterator, num_batches))
        count = sum((counted_tokens(batch) for batch in samples), torch.zeros((), dtype=torch.int64)).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return samples, count.clamp_min(1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            loss = self.distillation(inputs, model=model)
            return (loss, {"loss": loss}) if return_outputs else loss
        loss = self.distillation(inputs, num_items_in_batch, model=model)
        # the gradients' mean over the processes is to be their sum
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss


def _one_gpu(trainer: Trainer) -> None:
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{type(trainer).__name__} uses one GPU per process, and this process has {trainer.args.n_gpu}: start it "
            "with torchrun --nproc-per-node, or set CUDA_VISIBLE_DEVICES"
        )
