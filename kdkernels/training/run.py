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
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch.utils.data import DataLoader

from . import data, runs
from .distillation import Distillation
from .loop import fit
from .methods import METHODS, Method, make_method
from .models import ConvNet, small_student, small_teacher

TEACHER = "teacher"  # the folder of a teacher that was trained for a run


def train(args: argparse.Namespace) -> None:
    """Train a teacher unless one is given, then the student; print its accuracy and where its files are."""
    console = Console(quiet=not PartialState(cpu=not torch.accelerator.is_available()).is_main_process)
    method = _method(args.method, args.weight)
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it: give one of them")
    for folder in (args.output, args.output / TEACHER):
        if not args.resume and (folder == args.output or (method.needs_teacher and args.teacher is None)):
            runs.check_free(folder, args.overwrite)
    split = data.load(args.data)
    dataset = data.labelled_subset(split.train, args.per_class, args.seed) if args.per_class else split.train
    train_loader = data.loader(dataset, args.batch_size, train=True, triplets=method.triplets)
    test_loader = data.loader(split.test, 1000, train=False)
    set_seed(args.seed)
    _rehearse(_method(args.method, args.weight), split, train_loader)
    args.output.mkdir(parents=True, exist_ok=True)
    teacher = _teacher(args, split, console) if method.needs_teacher else None

    set_seed(args.seed)
    student = small_student(split.channels, split.classes)
    history = fit(
        Distillation(teacher, student, method),
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


def _rehearse(method: Method, split: data.Split, loader: DataLoader[Any]) -> None:
    """One batch through untrained networks: what the method refuses, it refuses before a teacher is trained."""
    teacher = small_teacher(split.channels, split.classes) if method.needs_teacher else None
    Distillation(teacher, small_student(split.channels, split.classes), method)(*next(iter(loader)))


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


def _teacher(args: argparse.Namespace, split: data.Split, console: Console) -> ConvNet:
    set_seed(args.seed)
    teacher = small_teacher(split.channels, split.classes)
    if args.teacher is not None:
        if not args.teacher.is_file():
            raise ValueError(f"--teacher {args.teacher} does not exist")
        try:
            load_model(teacher, str(args.teacher))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])  # of one line per layer
            raise ValueError(f"--teacher {args.teacher} holds no teacher for this data: {reason}") from None
        return teacher
    folder = args.output / TEACHER
    loaders = data.loader(split.train, 64, train=True), data.loader(split.test, 1000, train=False)
    history = fit(
        Distillation(None, teacher, "alone"),
        *loaders,
        epochs=args.teacher_epochs,
        lr=0.05,
        output=folder,
        overwrite=args.overwrite,
        resume=args.resume,
        seed=args.seed,
    )
    console.print(f"teacher: {history[-1]['test_accuracy']:.1f} %, kept in {folder / 'last.safetensors'}")
    return teacher
