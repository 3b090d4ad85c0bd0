"""Causal language models: the loss between a student and its teacher, without the logits of either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..heads import RESTS, Head, TopK
from ..linear_kd_loss import LinearKDLoss
from ..ops.checks import check_choice
from .modes import eval_mode
from .sequence_data import IGNORED

if TYPE_CHECKING:
    from .teacher_cache import TeacherCache

OWN = ("reduction", "ignore_index", "group")  # options of linear_kd_loss that are set here
TEACHERS = ("teacher_ids", "teacher_logprobs")  # a batch's columns of a TeacherCache


class LanguageModel:
    """A causal language model without its last product: ``LanguageModel(model, "student")(inputs)`` is a ``Head``.

    The head is what ``model.get_output_embeddings()`` says, and the hidden states are what the model gives it: a hook
    catches them and leaves the head no rows to compute. What the model does to its logits after that (a scale, a soft
    cap) is learned from how it treats a few given ones, once, with a single token.
    """

    def __init__(self, model: nn.Module, role: str) -> None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise TypeError(
                f"the {role} must be a causal language model whose get_output_embeddings() is its head "
                f"(AutoModelForCausalLM), got {type(model).__name__}"
            )
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            raise ValueError(
                f"the {role}'s head must be a plain nn.Linear, got {type(head).__module__}.{type(head).__name__}: "
                "merge LoRA into it, or leave it out of target_modules, modules_to_save and quantisation"
            )
        self.model, self.role, self.head = model, role, head
        # the keys and values that only generation needs
        self._options = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
        self.scale, self.softcap = self._after_the_head()

    def __call__(self, inputs: Mapping[str, Any], model: nn.Module | None = None) -> Head:
        """The hidden states of all tokens (B L, d) and the head; ``model`` may wrap the model, as DDP does."""
        seen: list[Tensor] = []

        def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(args[0])
            return (args[0][:, :0], *args[1:])

        with _removed(self.head.register_forward_pre_hook(cut)):
            (self.model if model is None else model)(**{**self._options, **inputs})
        if len(seen) != 1 or seen[0].dim() != 3:
            raise ValueError(
                f"the {self.role} must call its head once, with (B, L, d), got {[tuple(x.shape) for x in seen]}: "
                "compile its layers and not the whole model"
            )
        return Head(seen[0].flatten(0, 1), self.head.weight, self.head.bias, self.scale, self.softcap)

    @torch.no_grad()
    def _after_the_head(self) -> tuple[float, float | None]:
        """(scale, softcap) of logits = softcap tanh(scale z / softcap), where z is what the head makes."""
        z = torch.tensor([2.0**-10, 1.0, -7.0, 2.0**20], device=self.head.weight.device)
        given = z[None, :, None].expand(1, 4, self.head.out_features)
        token = torch.zeros(1, 1, dtype=torch.int64, device=z.device)
        hook = self.head.register_forward_hook(lambda module, args, output: given)
        with _removed(hook), eval_mode(self.model):
            logits = self.model(input_ids=token).logits.double()
        scale, largest = (logits[0, [0, 3], 0] * torch.tensor([2.0**10, 1.0], device=z.device)).tolist()
        softcap = abs(largest) if abs(largest) < 2**19 * abs(scale) else None
        made = z.double()[:, None] * scale
        if softcap is not None:
            scale = float(f"{scale:.6g}")  # tanh and a division have rounded it
            made = softcap * torch.tanh(made / softcap)
        if not torch.allclose(logits[0], made.expand_as(logits[0]), rtol=1e-3):
            raise ValueError(
                f"the {self.role} ({type(self.model).__name__}) does more to its logits than a scale and a soft cap: "
                "call linear_kd_loss with a Head of your own"
            )
        return scale, softcap


@contextmanager
def _removed(hook: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


class SequenceDistillation:
    """``SequenceDistillation(student, teacher)(batch)``: the loss of a batch of token sequences, by ``linear_kd_loss``.

    Neither model's logits are ever made. The teacher stays in eval mode and runs in ``torch.inference_mode()``; the
    student is trained as it is, gradient checkpointing included. It is no module: optimise ``student.parameters()``.

    Args:
        student: a causal language model with ``get_output_embeddings()``, such as ``AutoModelForCausalLM`` makes.
        teacher: another one with the same tokens, or a ``TeacherCache``, whose columns the batches then have.
        rest: what a cache's teacher says beyond its k tokens: "bucket", "drop", "renormalise" or "renormalise_both".
        options: of ``LinearKDLoss``: temperature, divergence, ce_weight and so on.

    A batch is a mapping with ``labels`` (B, L), in which token i + 1 is what position i is to predict and -100 does not
    count (padding, prompts), or ``shift_labels``, which are moved already. Everything else goes to both models.

    Raises:
        TypeError: a model without ``get_output_embeddings()``; a batch without labels, or without a cache's columns.
        ValueError: a head that is not a plain ``nn.Linear``, or whose logits are then changed by more than a scale and
            a soft cap; the student as its own teacher; an option that is set here; a cache for another vocabulary, or
            for another temperature unless ``rest`` renormalises it.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | TeacherCache, *, rest: str = "bucket", **options: Any
    ) -> None:
        if taken := sorted(set(OWN) & options.keys()):
            raise ValueError(f"SequenceDistillation sets {', '.join(taken)} itself")
        if teacher is student:
            raise ValueError("teacher and student are the same module: the teacher must be another one, or a copy")
        check_choice("SequenceDistillation: rest", rest, RESTS)
        self.student, self.teacher = student, teacher
        self.loss = LinearKDLoss(**options)
        self._student = LanguageModel(student, "student")
        self._teacher = LanguageModel(teacher.eval(), "teacher") if isinstance(teacher, nn.Module) else None
        self._rest, self._made_at = rest, 1.0
        if not isinstance(teacher, nn.Module):
            self._check_cache(teacher)
            self._made_at = teacher.temperature

    def _check_cache(self, cache: TeacherCache) -> None:
        from .teacher_cache import TeacherCache  # which needs safetensors

        if not isinstance(cache, TeacherCache):
            raise TypeError(
                f"the teacher must be a causal language model or a TeacherCache, got {type(cache).__name__}"
            )
        vocabulary = self.loss.options["vocab_size"] or self._student.head.out_features
        if cache.vocab_size != vocabulary:
            raise ValueError(
                f"the cache is of a vocabulary of {cache.vocab_size} tokens, and the student's has {vocabulary}: give "
                "the number of real tokens as vocab_size= here and when the cache is made"
            )
        temperature = self.loss.options["temperature"]
        if cache.temperature != temperature and self._rest in ("bucket", "drop"):
            raise ValueError(
                f"the cache was made at temperature {cache.temperature}, and temperature={temperature}: with "
                f"rest={self._rest!r} they must be the same"
            )

    def __call__(
        self, batch: Mapping[str, Any], denominator: Tensor | float | None = None, *, model: nn.Module | None = None
    ) -> Tensor:
        """The loss: a sum over the tokens that count, divided by their number.

        Args:
            batch: see above.
            denominator: another number to divide by: the tokens of all micro-batches of a step, so that they add up to
                the loss of one large batch.
            model: the student in a wrapper (DistributedDataParallel) to be called in its place.
        """
        inputs = {name: x for name, x in batch.items() if name not in ("labels", "shift_labels", *TEACHERS)}
        target = _next_tokens(batch)
        teacher = self._teacher_on(batch, inputs)
        return self.loss(self._student(inputs, model), teacher, target.flatten(), denominator=denominator)

    def _teacher_on(self, batch: Mapping[str, Any], inputs: Mapping[str, Any]) -> Head | TopK:
        if self._teacher is not None:
            with torch.inference_mode():
                return self._teacher(inputs)
        if missing := [name for name in TEACHERS if name not in batch]:
            raise TypeError(
                f"the batch has no {', '.join(missing)}: train on cache.join(dataset), with SequenceCollator"
            )
        ids, logprobs = (batch[name].flatten(0, 1) for name in TEACHERS)
        return TopK(ids, logprobs, self._rest, self._made_at)


def counted_tokens(batch: Mapping[str, Any]) -> Tensor:
    """How many positions have a token to predict that counts."""
    return (_next_tokens(batch) != IGNORED).sum()


def _next_tokens(batch: Mapping[str, Any]) -> Tensor:
    """(B, L): what each position is to predict."""
    if "shift_labels" in batch:
        return batch["shift_labels"]
    if "labels" not in batch:
        raise TypeError(f"the batch has no labels, only {', '.join(batch)}")
    return F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
