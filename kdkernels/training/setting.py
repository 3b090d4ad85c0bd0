"""What all trainings of one command share: the data, the two networks, and a teacher that is trained once."""

from __future__ import annotations

import argparse
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import data, runs
from .data.augment import make_augmentation
from .distillation import Distillation
from .evaluation import evaluate
from .loop import History, fit
from .methods import Method
from .methods.spelling import Spelling
from .models import load_weights, make_model, output_of
from .modes import eval_mode
from .progress import shown

TEACHER = "teacher"  # the folder of a teacher that was trained for a run
PRETRAINED = "pretrained"  # --teacher: the weights that its library publishes
TEACHER_BATCH = 64
TEST_BATCH = 1000, 100  # of small images, of those that are read one by one


class Setting:
    """Made from the options of ``train`` or ``compare``; a call of ``rehearse`` completes it.

    Raises:
        ValueError: data or networks that do not exist, or that do not go together.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.split = data.load(args.data, size=args.image_size, label=args.label_column, streaming=args.streaming)
        args.model = args.model or self.split.models[0]
        args.teacher_model = args.teacher_model or self.split.models[1]
        self.workers = self.split.workers if args.workers is None else args.workers
        self.augment: nn.Module | None = None
        self.console = main_console()

    def train_loader(self, method: Method, seed: int) -> DataLoader[Any]:
        """The student's batches: of all images, or of ``--per-class`` that are drawn with the seed."""
        args, images = self.args, self.split.train
        if args.per_class:
            images = data.labelled_subset(images, args.per_class, seed)
        return data.loader(images, args.batch_size, train=True, triplets=method.triplets, workers=self.workers)

    def images_of(self, method: Method) -> int:
        """How many images the student sees in an epoch, each view of one counted."""
        loader = self.train_loader(method, seed=0)
        batches = len(loader) * (loader.batch_size or 1)
        items = batches if loader.drop_last else len(cast(Sized, loader.dataset))
        return items * (3 if method.triplets else max(1, method.fixed_views))

    def test_loader(self) -> DataLoader[Any]:
        return data.loader(self.split.test, TEST_BATCH[self.workers > 0], train=False, workers=self.workers)

    def student(self) -> nn.Module:
        return make_model(self.args.model, self.split.channels, self.split.classes)

    def teacher(self) -> nn.Module:
        """The teacher with the weights that were given, if any were."""
        args = self.args
        pretrained = str(args.teacher) == PRETRAINED
        model = make_model(args.teacher_model, self.split.channels, self.split.classes, pretrained)
        if args.teacher is not None and not pretrained:
            try:
                load_weights(model, args.teacher)
            except ValueError as error:
                raise ValueError(f"--teacher holds no teacher {args.teacher_model}: {error}") from None
        return model

    def rehearse(self, spelling: Spelling, seed: int) -> nn.Module | None:
        """One batch through the networks: what they or the method refuse, they refuse before anything is trained.

        Returns the teacher, if the method needs one.
        """
        set_seed(seed)
        method = spelling.method()
        teacher = self.teacher() if method.needs_teacher else None
        images, *labels = next(iter(self.train_loader(method, seed)))
        self.augment = make_augmentation(self.args.augment or self.split.augment, images.shape[-1])
        student = self.student()
        for option, name, model in (
            ("--model", self.args.model, student),
            ("--teacher-model", self.args.teacher_model, teacher),
        ):
            if model is not None:
                _check_takes(model, f"{option} {name}", images)
        rehearsal = self.distillation(teacher, student, method, **spelling.pairs)
        rehearsal(images, *labels)
        rehearsal.close()
        return teacher

    def distillation(
        self, teacher: nn.Module | None, student: nn.Module, method: Method, **pairs: list[str]
    ) -> Distillation:
        options: dict[str, Any] = dict(pairs)
        if "conv" in pairs.get("adapt", ()):  # which has to see the features
            options["example"] = next(iter(self.test_loader()))[0][:2]
        output, teacher_output = output_of(self.args.model), output_of(self.args.teacher_model)
        options |= {"augment": self.augment, "output": output, "teacher_output": teacher_output}
        return Distillation(teacher, student, method, **options)

    def train_teacher(self, folder: Path, seed: int, resume: bool) -> tuple[nn.Module, History]:
        """The teacher trained on all training images, kept in ``folder``; where it is already, it is read."""
        args = self.args
        set_seed(seed)
        model = make_model(args.teacher_model, self.split.channels, self.split.classes)
        with shown(self.console, "teacher", args.teacher_epochs) as callbacks:
            history = fit(
                Distillation(None, model, "alone", augment=self.augment, output=output_of(args.teacher_model)),
                data.loader(self.split.train, TEACHER_BATCH, train=True, workers=self.workers),
                self.test_loader(),
                epochs=args.teacher_epochs,
                lr=args.teacher_lr,
                output=folder,
                overwrite=args.overwrite,
                resume=resume,
                callbacks=callbacks,
                progress=False,
                seed=seed,
            )
        for x in model.state_dict().values():
            broadcast(x)  # each process has seen other images, whose batch statistics are its own
        accuracy = history[-1]["test_accuracy"]
        self.console.print(f"teacher: {accuracy:.1f} %, kept in {folder / 'last.safetensors'}", soft_wrap=True)
        return model, history

    def accuracy(self, teacher: nn.Module) -> float:
        """On the test images, in percent."""
        teacher.to(torch.accelerator.current_accelerator() or "cpu")
        return evaluate(teacher, self.test_loader(), output=output_of(self.args.teacher_model))


def main_console() -> Console:
    """The terminal, for one of several processes."""
    return Console(quiet=not PartialState(cpu=not torch.accelerator.is_available()).is_main_process)


def check_folders(args: argparse.Namespace, method: Method) -> None:
    """Nothing is overwritten unasked, neither a run nor its teacher."""
    for folder in (args.output, args.output / TEACHER):
        if folder == args.output or (method.needs_teacher and args.teacher is None):
            runs.check_free(folder, args.overwrite)


def _check_takes(model: nn.Module, what: str, images: Tensor) -> None:
    try:
        with eval_mode(model), torch.no_grad():
            model(images[:2])
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what} takes no images {tuple(images.shape[1:])}: {reason}") from None
