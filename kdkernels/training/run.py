"""``kdkernels train``: one teacher, one student, one method."""

from __future__ import annotations

import argparse

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_model

from . import data
from .distillation import Distillation
from .loop import fit, make_accelerator
from .methods import METHODS, Method, make_method
from .models import ConvNet, small_student, small_teacher

WEIGHTED = ("kd", "sp", "amd", "at", "nst", "ickd", "rkd", "pkt", "cc", "irg", "nkd", "dist")


def train(args: argparse.Namespace) -> None:
    """Train a teacher unless one is given, then the student; print its accuracy and where its files are."""
    console = Console(quiet=not PartialState(cpu=not torch.accelerator.is_available()).is_main_process)
    method = _method(args.method, args.weight)
    split = data.load(args.data)
    test_loader = data.loader(split.test, 1000, train=False)
    teacher = _teacher(args, split, console) if method.needs_teacher else None

    # after the teacher's training, whose own accelerator overwrites the state that all of them share
    accelerator = make_accelerator(args.mixed_precision, args.accumulate)
    set_seed(args.seed)
    student = small_student(split.channels, split.classes)
    dataset = data.labelled_subset(split.train, args.per_class, args.seed) if args.per_class else split.train
    history = fit(
        Distillation(teacher, student, method).to(accelerator.device),
        data.loader(dataset, args.batch_size, train=True, triplets=method.triplets),
        test_loader,
        epochs=args.epochs,
        lr=args.lr,
        output=args.output,
        seed=args.seed,
        accelerator=accelerator,
    )
    best = max(row["test_accuracy"] for row in history)
    console.print(
        f"{args.method}: {history[-1]['test_accuracy']:.1f} % at the end, {best:.1f} % at best; "
        f"{history[-1]['step']:.0f} steps; metrics and checkpoints in {args.output}"
    )


# methods of one weight, which the command line sets
WEIGHTED = ("kd", "sp", "amd", "at", "nst", "ickd", "rkd", "pkt", "cc", "irg", "nkd", "dist")


def _method(name: str, weight: float | None) -> Method:
    if weight is None:
        return make_method(name)
    if name in WEIGHTED:
        return make_method(name, weight=weight)
    raise ValueError(
        f"--weight belongs to the methods {', '.join(WEIGHTED)}, got {name!r} (methods: {', '.join(METHODS)})"
    )


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
    folder = args.output / "teacher"
    loaders = data.loader(split.train, 64, train=True), data.loader(split.test, 1000, train=False)
    history = fit(
        Distillation(None, teacher, "alone"),
        *loaders,
        epochs=args.teacher_epochs,
        lr=0.05,
        output=folder,
        seed=args.seed,
    )
    console.print(f"teacher: {history[-1]['test_accuracy']:.1f} %, kept in {folder / 'last.safetensors'}")
    return teacher
