"""``kdkernels train``: one teacher, one student, one method."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import data, runs
from .data.augment import make_augmentation
from .distillation import Distillation
from .loop import fit
from .methods import METHODS, Method, make_method
from .models import load_weights, make_model, output_of
from .modes import eval_mode

TEACHER = "teacher"  # the folder of a teacher that was trained for a run
PRETRAINED = "pretrained"  # --teacher: the weights that its library publishes
TEST_BATCH = 1000, 100  # of small images, of those that are read one by one


def train(args: argparse.Namespace) -> None:
    """Train a teacher unless one is given, then the student; print its accuracy and where its files are."""
    console = Console(quiet=not PartialState(cpu=not torch.accelerator.is_available()).is_main_process)
    method = _method(args.method, args.weight)
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it: give one of them")
    for folder in (args.output, args.output / TEACHER):
        if not args.resume and (folder == args.output or (method.needs_teacher and args.teacher is None)):
            runs.check_free(folder, args.overwrite)
    split = data.load(args.data, size=args.image_size, label=args.label_column, streaming=args.streaming)
    args.model, args.teacher_model = args.model or split.models[0], args.teacher_model or split.models[1]
    workers = split.workers if args.workers is None else args.workers
    dataset = data.labelled_subset(split.train, args.per_class, args.seed) if args.per_class else split.train
    train_loader = data.loader(dataset, args.batch_size, train=True, triplets=method.triplets, workers=workers)
    test_loader = data.loader(split.test, TEST_BATCH[workers > 0], train=False, workers=workers)
    set_seed(args.seed)
    teacher = _teacher(args, split) if method.needs_teacher else None
    augment = _rehearse(args, teacher, split, train_loader)
    args.output.mkdir(parents=True, exist_ok=True)
    if teacher is not None and args.teacher is None:
        teacher = _train_teacher(args, split, augment, console)

    set_seed(args.seed)
    student = make_model(args.model, split.channels, split.classes)
    history = fit(
        _distillation(args, teacher, student, method, augment),
        train_loader,
        test_loader,
        epochs=args.epochs,
        lr=args.lr,
        accumulate=args.accumulate,
        mixed_precision=args.mixed_precision,
        output=args.output,
        overwrite=args.overwrite,
        resume=args.resume,
        seed=args.seed,
    )
    best = max(row["test_accuracy"] for row in history)
    console.print(
        f"{args.method}: {history[-1]['test_accuracy']:.1f} % at the end, {best:.1f} % at best; "
        f"{history[-1]['step']:.0f} steps; metrics and checkpoints in {args.output}"
    )


def _rehearse(
    args: argparse.Namespace, teacher: nn.Module | None, split: data.Split, loader: DataLoader[Any]
) -> nn.Module | None:
    """One batch through the networks: what one of them or the method refuses, it refuses before anything is trained.

    Returns the augmentation of the images."""
    images, *labels = next(iter(loader))
    augment = make_augmentation(args.augment or split.augment, images.shape[-1])
    student = make_model(args.model, split.channels, split.classes)
    _check_takes(student, "--model", args.model, images)
    if teacher is not None:
        _check_takes(teacher, "--teacher-model", args.teacher_model, images)
    rehearsal = _distillation(args, teacher, student, _method(args.method, args.weight), augment)
    rehearsal(images, *labels)
    rehearsal.close()
    return augment


def _check_takes(model: nn.Module, option: str, name: str, images: Tensor) -> None:
    try:
        with eval_mode(model), torch.no_grad():
            model(images[:2])
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{option} {name} takes no images {tuple(images.shape[1:])}: {reason}") from None


def _distillation(
    args: argparse.Namespace,
    teacher: nn.Module | None,
    student: nn.Module,
    method: Method,
    augment: nn.Module | None,
) -> Distillation:
    output, teacher_output = output_of(args.model), output_of(args.teacher_model)
    return Distillation(teacher, student, method, augment=augment, output=output, teacher_output=teacher_output)


def _method(names: str, weights: Sequence[str]) -> Method:
    """The method, or several joined by +, with the weights that were given as "300" or "sp=300"."""
    options: dict[str, dict[str, float]] = {name: {} for name in names.split("+")}
    for text in weights:
        name, _, number = text.rpartition("=")
        if not name and len(options) > 1:
            raise ValueError(
                f"--weight {text}: say of which of {', '.join(options)} it is, as {next(iter(options))}={text}"
            )
        name = name or names
        if name in METHODS and "weight" not in signature(METHODS[name]).parameters:
            takers = [n for n, method in METHODS.items() if "weight" in signature(method).parameters]
            raise ValueError(f"--weight belongs to the methods {', '.join(takers)}, got {name!r}")
        if name not in options:
            raise ValueError(f"--weight {text}: {name!r} is not among the methods {names}")
        try:
            options[name]["weight"] = float(number)
        except ValueError:
            raise ValueError(f"--weight must be a number or method=number, got {text!r}") from None
    if len(options) < len(names.split("+")):
        raise ValueError(f"--method names a method twice, got {names!r}")
    return make_method(names, **options[names]) if len(options) == 1 else make_method(list(options.items()))


def _teacher(args: argparse.Namespace, split: data.Split) -> nn.Module:
    """The teacher with the weights that were given, if any were."""
    pretrained = str(args.teacher) == PRETRAINED
    teacher = make_model(args.teacher_model, split.channels, split.classes, pretrained)
    if args.teacher is not None and not pretrained:
        try:
            load_weights(teacher, args.teacher)
        except ValueError as error:
            raise ValueError(f"--teacher holds no teacher {args.teacher_model}: {error}") from None
    return teacher


def _train_teacher(
    args: argparse.Namespace, split: data.Split, augment: nn.Module | None, console: Console
) -> nn.Module:
    set_seed(args.seed)
    teacher = make_model(args.teacher_model, split.channels, split.classes)
    folder = args.output / TEACHER
    workers = split.workers if args.workers is None else args.workers
    history = fit(
        Distillation(None, teacher, "alone", augment=augment, output=output_of(args.teacher_model)),
        data.loader(split.train, 64, train=True, workers=workers),
        data.loader(split.test, TEST_BATCH[workers > 0], train=False, workers=workers),
        epochs=args.teacher_epochs,
        lr=0.05,
        output=folder,
        overwrite=args.overwrite,
        resume=args.resume,
        seed=args.seed,
    )
    console.print(f"teacher: {history[-1]['test_accuracy']:.1f} %, kept in {folder / 'last.safetensors'}")
    return teacher
