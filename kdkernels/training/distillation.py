"""A teacher, a student and a method as one module that returns the loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.checks import compute_dtype
from .adapters import check_adapters, check_maps, convolution, hint, pairs_alike
from .layouts import Size, image_size, token_map
from .methods import Batch, Method, Outputs, Part, make_method
from .modes import eval_mode
from .outputs import Output, read
from .stages import Layers, at_most, fewer, pair_layers, stage_names
from .taps import FeatureTaps, unwrap
from .widths import stated_outputs

RETURNED = ["returned"]

logger = logging.getLogger("kdkernels")


class DistillationOutput(NamedTuple):
    """loss: the scalar to minimise; terms: its weighted parts, without graph; logits: the student's."""

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class Distillation(nn.Module):
    """``Distillation(teacher, student, "sp")(images, target)`` is what any trainer needs.

    Args:
        teacher: a trained model, or None for a method without a teacher ("alone", "corsd"). It is put in eval mode and
            stays there, moves with ``.to()``, gets no gradients, and is in neither ``parameters()`` nor
            ``state_dict()``.
        student: the model to train, for the same images.
        method: a name ("alone", "kd", "sp", "stkd", "amd", "mlkd", "corsd"), a ``Method`` with your options, or
            several: "kd+sp" or ["kd", ("sp", {"weight": 300})], see ``make_method``.
        layers, teacher_layers: names of the modules whose outputs a feature method compares, or pairs of them,
            ``layers={student: teacher}``. ``teacher_layers`` defaults to ``layers``, and ``layers`` to the stages that
            the method's paper uses: the last one or all of ``stage_names``. Of unequally many the last are compared,
            or evenly spread ones where maps do not shrink; a logged line names them.
            "returned" are those that the model itself returns, as (logits, [features]).
        output, teacher_output: where a model returns no tensor of logits: the logits' name or position in what it
            returns (``output="logits"``), or a function of it. ``teacher_output`` defaults to ``output``.
        adapt: names of adapters that may bridge a pair of features: "map" makes a map of tokens, "pool" averages the
            larger map to the size of the smaller, "conv" gives the student's features the teacher's width (1 x 1; its
            parameters train with the student, and it needs ``example``).
        augment: a module that changes a batch of images, as ``training.data.augment.CropFlip``; in training mode both
            networks see what it returns.
        example: a batch of images on the models' device. A method with heads ("mlkd", "corsd") runs it once to learn
            how wide the features are; without it their widths are read off the models' layers.

    ``distillation(images, target)`` returns the loss, its terms and the student's logits; for "corsd" images and labels
    are triplets: ``distillation(images, target, target_neg)``, and in training mode nothing else. Call ``close()`` to
    take the hooks off both models.

    Raises:
        ValueError: a method or a layer that does not exist; a missing teacher, or one that the method has no use for;
            the student as its own teacher; unequal numbers of layers; features whose widths need an example (the first
            forward pass raises if their layers state wrong ones); a ``Method`` with heads for another Distillation;
            from the forward pass in training mode, no triplets for a method that needs them.
        TypeError: from the forward pass, a model that returns neither logits nor (logits, [features]).
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        method: str | Method | Sequence[Part],
        *,
        layers: Layers | None = None,
        teacher_layers: str | Sequence[str] | None = None,
        adapt: str | Sequence[str] = (),
        output: Output | None = None,
        teacher_output: Output | None = None,
        augment: nn.Module | None = None,
        example: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.method = make_method(method)
        self._check_teacher(teacher, student)
        self.student = student
        self._frozen: list[nn.Module] = []
        # in a tuple, so that the teacher is no submodule: not in parameters(), state_dict() or DDP's buffers
        self._teacher = () if teacher is None else (teacher.eval(),)
        self.output, self.teacher_output = output, output if teacher_output is None else teacher_output
        self.adapt = check_adapters(adapt)
        self.adapters = nn.ModuleList()
        self.augment = augment
        student_names, teacher_names = self._choose(*pair_layers(layers, teacher_layers))
        self._student_taps = FeatureTaps(student, student_names)
        self._teacher_taps: FeatureTaps | None = None
        self._stated_widths: tuple[list[int], list[int]] | None = None  # until the first forward has confirmed them
        try:
            if self.teacher is not None:
                self._teacher_taps = FeatureTaps(self.teacher, teacher_names)
            self._build(example)
        except BaseException:
            self.close()  # no hooks of a Distillation that nobody gets
            raise

    def _check_teacher(self, teacher: nn.Module | None, student: nn.Module) -> None:
        name = type(self.method).__name__
        if teacher is None and self.method.needs_teacher:
            raise ValueError(f"method {name} needs a teacher, got None")
        if teacher is not None and not self.method.needs_teacher:
            raise ValueError(f"method {name} learns from no teacher, and would ignore this one: give None")
        if teacher is not None and unwrap(teacher) is unwrap(student):
            raise ValueError("teacher and student are the same module: the teacher must be another one, or a copy")

    def _choose(self, students: list[str] | None, teachers: list[str] | None) -> tuple[list[str], list[str]]:
        """The layers to tap, those that were named or the method's own choice."""
        self.method.named_layers = students is not None
        self._returned = students == RETURNED, teachers == RETURNED
        chosen = []
        for model, names in ((self.student, students), (self.teacher, teachers)):
            if model is None or names == RETURNED or (names is None and self.method.stages == "none"):
                names = []
            elif names is None:
                names = stage_names(model)
                names = names[-1:] if self.method.stages == "last" else names
                names = at_most(model, names, self.method.most_layers or len(names))
            chosen.append(names)
        counts = [len(names) for names in chosen]
        if self.teacher is None or counts[0] == counts[1] or any(self._returned):
            return chosen[0], chosen[1]
        if students is not None or teachers is not None:
            raise ValueError(f"as many teacher as student layers are needed, got {chosen[0]} and {chosen[1]}")
        students = fewer(self.student, chosen[0], min(counts))
        teachers = fewer(self.teacher, chosen[1], min(counts))
        pairs = dict(zip(students, teachers, strict=True))
        logger.warning("student and teacher have %d and %d stages; compared are layers=%s", *counts, pairs)
        return students, teachers

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0] if self._teacher else None

    def _build(self, example: Tensor | None) -> None:
        """Let the method make its own parameters, whose sizes depend on the features, and make the adapters."""
        name = type(self.method).__name__
        if self.method.needs_widths and self.method.built:
            raise ValueError(f"this {name} has heads for another Distillation already: make a new one for each")
        if self.teacher is None and set(self.adapt) - {"map"}:
            raise ValueError(
                f"adapt={self.adapt} makes features like a teacher's, and method {name} has no teacher: 'map' alone is "
                "of use to it"
            )
        outputs: tuple[Outputs, Outputs | None] | None = None
        size = None if example is None else image_size(example)
        if example is not None and (self.method.needs_widths or "conv" in self.adapt):
            with eval_mode(self.student), torch.no_grad():
                outputs = self._both(example)
        elif "conv" in self.adapt:
            raise ValueError("adapt='conv' depends on the features' widths: give a batch of images as example=...")
        elif self.method.needs_widths:
            own = stated_outputs(self.student, self._student_taps.names, self.method)
            outputs = own, None
            if self.teacher is not None and self._teacher_taps is not None:
                outputs = own, stated_outputs(self.teacher, self._teacher_taps.names, self.method)
            self._stated_widths = self.method.widths(*outputs)
        if outputs is None:
            return
        if "conv" in self.adapt:
            self.adapters.extend(convolution(s, t) for s, t in pairs_alike(self.adapt, *outputs, size))
        if self.method.needs_widths:
            self.method.build(*(outputs if example is None else self._adapted(*outputs, size)))
            self.method.to(outputs[0].logits.device, compute_dtype(outputs[0].logits))
            self.method.built = True

    def outputs(self, images: Tensor, teacher: Outputs | None = None) -> tuple[Outputs, Outputs | None]:
        """Student and teacher on the same images; the teacher does not run where its outputs are given."""
        student, teacher = self._adapted(*self._both(images, teacher), image_size(images))
        if self._stated_widths is not None:
            # what layers state can mislead: a module may concatenate, a head may be registered first
            real = self.method.widths(student, teacher)
            if real != self._stated_widths:
                raise ValueError(
                    f"method {type(self.method).__name__} was built for the widths (student, teacher) that layers "
                    f"state, {self._stated_widths}, but they are {real}: give a batch of images as example=..."
                )
            self._stated_widths = None
        return student, teacher

    def predict(self, images: Tensor) -> Tensor:
        """The student's logits."""
        return read(self.student(images), self.output, "student")[0]

    def teacher_outputs(self, images: Tensor) -> Outputs:
        """The teacher's logits and features of these images, before any adapter."""
        assert self.teacher is not None
        assert self._teacher_taps is not None
        with torch.no_grad():
            return self._run(self.teacher, images, self.teacher_output, self._teacher_taps, "teacher")

    @property
    def teacher_layers(self) -> list[str]:
        """The names of the layers whose outputs are the teacher's features."""
        return RETURNED if self._teacher_taps is None or self._returned[1] else self._teacher_taps.names

    def _both(self, images: Tensor, teacher: Outputs | None = None) -> tuple[Outputs, Outputs | None]:
        student = self._run(self.student, images, self.output, self._student_taps, "student")
        if teacher is None and self.teacher is not None:
            teacher = self.teacher_outputs(images)
        return student, teacher

    def _run(self, model: nn.Module, images: Tensor, output: Output | None, taps: FeatureTaps, whose: str) -> Outputs:
        logits, returned = read(model(images), output, whose)
        if not self._returned[whose == "teacher"]:
            return Outputs(logits, taps.pop())
        if returned is None:
            raise ValueError(f"layers='returned', but the {whose} returns logits alone, and not (logits, [features])")
        return Outputs(logits, returned[-1:] if self.method.stages == "last" else returned)

    def _adapted(self, student: Outputs, teacher: Outputs | None, size: Size | None) -> tuple[Outputs, Outputs | None]:
        if "map" in self.adapt and teacher is None:
            student = student._replace(features=[token_map(x, size) for x in student.features])
        if self.adapt and teacher is not None:
            pairs = pairs_alike(self.adapt, student, teacher, size)
            if self.adapters:
                pairs = [(adapter(s), t) for adapter, (s, t) in zip(self.adapters, pairs, strict=True)]
            student = student._replace(features=[s for s, _ in pairs])
            teacher = teacher._replace(features=[t for _, t in pairs])
        if self.method.maps:
            check_maps(student, teacher, size, type(self.method).__name__)
        return student, teacher

    def batch(
        self, images: Tensor, target: Tensor, target_neg: Tensor | None = None, teacher: Outputs | None = None
    ) -> Batch:
        """What the networks will see; the method mixes and augments only in training mode.

        ``teacher`` are the teacher's outputs for these images, where they are known (``fit(teacher_cache=...)``).
        """
        if self.training and self.method.triplets and target_neg is None:
            raise ValueError(
                f"method {type(self.method).__name__} trains on triplets (images, target, target_neg), and got no "
                "target_neg: kdkernels.training.triplets.triplet_loader makes them from any labelled data set, as fit "
                "does by itself"
            )
        if self.training:
            images = images if self.augment is None else self.augment(images)
            return self.method.prepare(images, target, target_neg)._replace(teacher=teacher)
        return Batch(images, target, target_neg=target_neg, teacher=teacher)

    def forward(
        self, images: Tensor, target: Tensor, target_neg: Tensor | None = None, teacher: Outputs | None = None
    ) -> DistillationOutput:
        batch = self.batch(images, target, target_neg, teacher)
        return self.loss(*self.outputs(batch.images, batch.teacher), batch)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> DistillationOutput:
        """The loss of given outputs."""
        try:
            terms = self.method.terms(student, teacher, batch)
        except (ValueError, RuntimeError) as error:
            more = "" if teacher is None else hint(error, self.adapt, student.features, teacher.features)
            if not more:
                raise
            raise ValueError(f"{error}; {more}") from error
        loss = torch.stack(list(terms.values())).sum()
        return DistillationOutput(loss, {name: term.detach() for name, term in terms.items()}, student.logits)

    def schedule(self, share: float) -> None:
        """Set weights that are schedules to their values after that share (0 to 1) of the training."""
        self.method.schedule(share)

    def close(self) -> None:
        """Take the hooks off both models."""
        self._student_taps.remove()
        if self._teacher_taps is not None:
            self._teacher_taps.remove()

    def train(self, mode: bool = True) -> Distillation:
        """As ever, but parts of the student that were put in eval mode while it trains (frozen batch norms) stay so."""
        if self.student.training:
            self._frozen = [module for module in self.student.modules() if not module.training]
        super().train(mode)
        for module in self._frozen if mode else ():
            module.training = False
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distillation:
        super()._apply(fn, recurse)  # .to(), .cuda(), .half() move the teacher too
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self
