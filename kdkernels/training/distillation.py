"""A teacher, a student and a method as one module that returns the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .methods import Batch, Method, Outputs, make_method
from .taps import FeatureTaps, stage_names, unwrap, width


class DistillationOutput(NamedTuple):
    """loss: the scalar to minimise; terms: its weighted parts, without graph; logits: the student's."""

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every submodule is in the mode it had before, as some may be frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Distillation(nn.Module):
    """``Distillation(teacher, student, "sp")(images, target)`` is what any trainer needs.

    Args:
        teacher: a trained model that returns logits, or None for a method without a teacher. It is put in eval mode and
            stays there, moves with ``.to()``, gets no gradients, and is in neither ``parameters()`` nor
            ``state_dict()``.
        student: the model to train, returning logits for the same images.
        method: a name ("kd", "sp", ...: the keys of ``training.methods.METHODS``), or a ``Method`` with options.
        layers, teacher_layers: names of the modules whose outputs a feature method compares. ``teacher_layers``
            defaults to ``layers``, and ``layers`` to the stages that the method's paper uses (the last one or all).
        example: a batch of images on the models' device. A method with heads ("mlkd", "corsd") runs it once to learn
            how wide the features are; without it their widths are read off the models' layers.

    ``distillation(images, target)`` returns the loss, its terms and the student's logits; for "corsd" images and labels
    are triplets: ``distillation(images, target, target_neg)``. Call ``close()`` to take the hooks off both models.

    Raises:
        ValueError: a method or a layer that does not exist; a missing teacher; the student as its own teacher; unequal
            numbers of layers; features whose widths need an example (the first forward pass raises if their layers
            state wrong ones); a ``Method`` with heads for another Distillation.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        method: str | Method,
        *,
        layers: str | Sequence[str] | None = None,
        teacher_layers: str | Sequence[str] | None = None,
        example: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.method = make_method(method) if isinstance(method, str) else method
        if teacher is None and self.method.needs_teacher:
            raise ValueError(f"method {type(self.method).__name__} needs a teacher, got None")
        if teacher is not None and self.method.needs_teacher and unwrap(teacher) is unwrap(student):
            raise ValueError("teacher and student are the same module: the teacher must be another one, or a copy")
        self.student = student
        # in a tuple, so that the teacher is no submodule: not in parameters(), state_dict() or DDP's buffers
        self._teacher = (teacher.eval(),) if teacher is not None and self.method.needs_teacher else ()
        student_names = self._choose(student, layers)
        teacher_names = self._choose(self.teacher, layers if teacher_layers is None else teacher_layers)
        if self.teacher is not None and len(student_names) != len(teacher_names):
            raise ValueError(f"as many teacher as student layers are needed, got {student_names} and {teacher_names}")
        self._student_taps = FeatureTaps(student, student_names)
        self._teacher_taps: FeatureTaps | None = None
        self._stated_widths: tuple[list[int], list[int]] | None = None  # until the first forward has confirmed them
        try:
            if self.teacher is not None:
                self._teacher_taps = FeatureTaps(self.teacher, teacher_names)
            if self.method.needs_widths:
                self._build(example)
        except BaseException:
            self.close()  # no hooks of a Distillation that nobody gets
            raise

    def _choose(self, model: nn.Module | None, layers: str | Sequence[str] | None) -> list[str]:
        if model is None:
            return []
        if layers is not None:
            return [layers] if isinstance(layers, str) else list(layers)
        if self.method.stages == "none":
            return []
        names = stage_names(model)
        return names[-1:] if self.method.stages == "last" else names

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0] if self._teacher else None

    def _build(self, example: Tensor | None) -> None:
        """Let the method make its own parameters, whose sizes depend on the features."""
        if self.method.built:
            raise ValueError(
                f"this {type(self.method).__name__} has heads for another Distillation already: make a new one for each"
            )
        if example is None:
            student = self._stated(self.student, self._student_taps)
            teacher = self._stated(self.teacher, self._teacher_taps) if self._teacher_taps is not None else None
            self._stated_widths = self._widths(student), self._widths(teacher)
            self.method.build(student, teacher)
        else:
            with eval_mode(self.student), torch.no_grad():
                self.method.build(*self.outputs(example))
        self.method.built = True

    def _stated(self, model: nn.Module | None, taps: FeatureTaps) -> Outputs:
        """Empty outputs of the widths that the layers state; nothing has to run."""
        assert model is not None
        bare = unwrap(model)
        logits_width = width(bare) if self.method.needs_classes else 0
        widths = [logits_width, *(width(bare.get_submodule(name)) for name in taps.names)]
        if None in widths:
            raise ValueError(
                f"method {type(self.method).__name__} has parameters of its own, and the widths of {taps.names} of "
                f"{type(bare).__name__} cannot be read off its layers: give a batch of images as example=..."
            )
        logits, *features = (torch.empty(1, n) for n in widths if n is not None)
        return Outputs(logits, features)

    def outputs(self, images: Tensor) -> tuple[Outputs, Outputs | None]:
        """Student and teacher on the same images."""
        student, teacher = Outputs(self.student(images), self._student_taps.pop()), None
        if self.teacher is not None and self._teacher_taps is not None:
            with torch.no_grad():
                teacher = Outputs(self.teacher(images), self._teacher_taps.pop())
        if self._stated_widths is not None:
            # what layers state can mislead: a module may concatenate, a head may be registered first
            real = self._widths(student), self._widths(teacher)
            if real != self._stated_widths:
                raise ValueError(
                    f"method {type(self.method).__name__} was built for the widths (student, teacher) that layers "
                    f"state, {self._stated_widths}, but they are {real}: give a batch of images as example=..."
                )
            self._stated_widths = None
        return student, teacher

    def _widths(self, outputs: Outputs | None) -> list[int]:
        """The widths that the method's heads depend on."""
        if outputs is None:
            return []
        return [x.shape[1] for x in (*outputs.features, *[outputs.logits][: self.method.needs_classes])]

    def batch(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        """What the networks will see; the method mixes and augments only in training mode."""
        if self.training:
            return self.method.prepare(images, target, target_neg)
        return Batch(images, target, target_neg=target_neg)

    def forward(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> DistillationOutput:
        batch = self.batch(images, target, target_neg)
        return self.loss(*self.outputs(batch.images), batch)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> DistillationOutput:
        """The loss of given outputs."""
        terms = self.method.terms(student, teacher, batch)
        loss = torch.stack(list(terms.values())).sum()
        return DistillationOutput(loss, {name: term.detach() for name, term in terms.items()}, student.logits)

    def close(self) -> None:
        """Take the hooks off both models."""
        self._student_taps.remove()
        if self._teacher_taps is not None:
            self._teacher_taps.remove()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distillation:
        super()._apply(fn, recurse)  # .to(), .cuda(), .half() move the teacher too
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self
