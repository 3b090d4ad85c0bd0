"""``kdkernels train``: one teacher, one student, one method."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from accelerate.utils import set_seed

from . import plots, record, runs
from .loop import fit
from .methods import METHODS
from .methods.spelling import Spelling, options_of, parse
from .progress import shown
from .setting import TEACHER, Setting, check_folders


def train(args: argparse.Namespace) -> None:
    """Train a teacher unless one is given, then the student; print its accuracy and where its files are."""
    spelling = spelt(args.method, args.weight)
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it: give one of them")
    if not args.resume:
        check_folders(args, spelling.method())
    setting = Setting(args)
    teacher = setting.rehearse(spelling, args.seed)
    console = setting.console
    args.output.mkdir(parents=True, exist_ok=True)
    if not console.quiet:
        record.write(args.output, args)
    if teacher is not None and args.teacher is None:
        teacher, _ = setting.train_teacher(args.output / TEACHER, args.seed, args.resume)

    set_seed(args.seed)
    student, method = setting.student(), spelling.method()
    with shown(console, args.method, args.epochs) as callbacks:
        history = fit(
            setting.distillation(teacher, student, method, **spelling.pairs),
            setting.train_loader(method, args.seed),
            setting.test_loader(),
            epochs=args.epochs,
            lr=args.lr,
            accumulate=args.accumulate,
            mixed_precision=args.mixed_precision,
            output=args.output,
            overwrite=args.overwrite,
            resume=args.resume,
            callbacks=callbacks,
            progress=False,
            seed=args.seed,
        )
    if not console.quiet:
        runs.write_whole(args.output / "curves.png", lambda path: plots.plot_run(args.method, history, path))
    best = max(row["test_accuracy"] for row in history)
    console.print(
        f"{args.method}: {history[-1]['test_accuracy']:.1f} % at the end, {best:.1f} % at best; "
        f"{history[-1]['step']:.0f} steps; metrics and checkpoints in {args.output}",
        soft_wrap=True,
    )


def spelt(text: str, weights: Sequence[str]) -> Spelling:
    """The method, or several joined by +, with the weights that were given as "300" or "sp=300" besides."""
    spelling = parse(text)
    if spelling.lr is not None:
        raise ValueError(f"--method {text}: the learning rate is --lr here")
    options = {name: dict(given) for name, given in spelling.parts}
    for weight in weights:
        name, _, number = weight.rpartition("=")
        if not name and len(options) > 1:
            first = next(iter(options))
            raise ValueError(f"--weight {weight}: say of which of {', '.join(options)} it is, as {first}={weight}")
        name = name or spelling.parts[0][0]
        if name in METHODS and "weight" not in options_of(name):
            takers = [n for n in METHODS if "weight" in options_of(n)]
            raise ValueError(f"--weight belongs to the methods {', '.join(takers)}, got {name!r}")
        if name not in options:
            raise ValueError(f"--weight {weight}: {name!r} is not among the methods {text}")
        try:
            options[name]["weight"] = float(number)
        except ValueError:
            raise ValueError(f"--weight must be a number or method=number, got {weight!r}") from None
    return replace(spelling, parts=list(options.items()))
