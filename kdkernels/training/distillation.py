"""A teacher, a student and a method as one module that returns the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Distillation(nn.Module):
    """``Distillation(teacher, student, "sp")(images, target)`` is what any trainer needs.

    Args:
        teacher: a trained model that returns logits, or None for a method that has no teacher. It is put in eval mode
            and stays there, moves with ``.to()``, gets no gradients, and is in neither ``parameters()`` nor
            ``state_dict()``.
        student: the model to train, returning logits for the same images.
        method: a name ("alone", "kd", "sp", "stkd", "amd", "mlkd", "corsd"), or a ``Method`` with options of your own.
        layers, teacher_layers: module names whose outputs a feature method compares; ``teacher_layers`` defaults to
            ``layers``, and ``layers`` to the networks' stages as the method's paper uses them (the last one or all).
        example: a batch of images on the models' device. A method with heads of its own ("mlkd", "corsd") runs it
            once to learn how wide the features are; without it their widths are read off the models' layers.

    ``distillation(images, target)`` returns the loss, its terms and the student's logits; for "corsd" images and labels
    are triplets: ``distillation(images, target, target_neg)``. Call ``close()`` to take the hooks off both models.

    Raises:
        ValueError: a method or a layer that does not exist, a missing teacher, unequal numbers of layers, or
            features whose widths only an example could tell.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        method: str | Method,
        *,
        layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
        example: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.method = make_method(method) if isinstance(method, str) else method
        if teacher is None and self.method.needs_teacher:
            raise ValueError(f"method {type(self.method).__name__} needs a teacher, got None")
        self.student = student
        # in a tuple, so that the teacher is no submodule: not in parameters(), state_dict() or DDP's buffers
        self._teacher = (teacher.eval(),) if teacher is not None and self.method.needs_teacher else ()
        self._student_taps, self._teacher_taps = self._taps(layers, teacher_layers)
        if self.method.needs_widths:
            self._build(example)

    def _taps(
        self, layers: Sequence[str] | None, teacher_layers: Sequence[str] | None
    ) -> tuple[FeatureTaps, FeatureTaps | None]:
        def choose(model: nn.Module) -> Sequence[str]:
            if self.method.stages == "none":
                return []
            names = stage_names(model)
            return names[-1:] if self.method.stages == "last" else names

        student_names = choose(self.student) if layers is None else layers
        if self.teacher is None:
            return FeatureTaps(self.student, student_names), None
        teacher_names = teacher_layers or (choose(self.teacher) if layers is None else layers)
        if len(student_names) != len(teacher_names):
            raise ValueError(f"as many teacher as student layers are needed, got {student_names} and {teacher_names}")
        return FeatureTaps(self.student, student_names), FeatureTaps(self.teacher, teacher_names)

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0] if self._teacher else None

    def _build(self, example: Tensor | None) -> None:
        """Have the method make its own parameters, whose sizes depend on the features."""
        if example is None:
            student = self._stated(self.student, self._student_taps)
            teacher = self._stated(self.teacher, self._teacher_taps) if self._teacher_taps is not None else None
            self.method.build(student, teacher)
            return
        training = self.student.training
        self.student.eval()
        with torch.no_grad():
            self.method.build(*self.outputs(example))
        self.student.train(training)

    def _stated(self, model: nn.Module | None, taps: FeatureTaps) -> Outputs:
        """Outputs as wide as the layers say they are: nothing has to run for it."""
        assert model is not None
        bare = unwrap(model)
        widths = [width(bare), *(width(bare.get_submodule(name)) for name in taps.names)]
        if None in widths:
            raise ValueError(
                f"method {type(self.method).__name__} has parameters of its own, and the widths of {taps.names} of "
                f"{type(bare).__name__} cannot be read off its layers: give a batch of images as example=..."
            )
        logits, *features = (torch.empty(1, n) for n in widths if n is not None)
        return Outputs(logits, features)

    def outputs(self, images: Tensor) -> tuple[Outputs, Outputs | None]:
        """Student and teacher on the same images."""
        student = Outputs(self.student(images), self._student_taps.pop())
        if self.teacher is None or self._teacher_taps is None:
            return student, None
        with torch.no_grad():
            return student, Outputs(self.teacher(images), self._teacher_taps.pop())

    def batch(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        """What the networks are to see: the method's mixing and augmenting happen in training mode alone."""
        if self.training:
            return self.method.prepare(images, target, target_neg)
        return Batch(images, target, target_neg=target_neg)

    def forward(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> DistillationOutput:
        batch = self.batch(images, target, target_neg)
        return self.loss(*self.outputs(batch.images), batch)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> DistillationOutput:
        """The loss of outputs that are there already."""
        terms = self.method.terms(student, teacher, batch)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
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
