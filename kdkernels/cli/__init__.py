"""Exact, fast knowledge distillation: train a student, compare methods, see what there is."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import __version__
from ..ops.backend import BackendError
from . import compare, evaluate, export, others, plan, train
from .arguments import Parser
from .config import with_config


class Command(NamedTuple):
    """What it is for, its options, and what it does; that imports what it needs, and returns an exit code or None."""

    help: str
    add: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int | None]


COMMANDS = {
    "train": Command("train one student with one method", train.add, train.run),
    "compare": Command("train with many methods and seeds, and make a table of them", compare.add, compare.run),
    "eval": Command("accuracy and loss of the network in a file", evaluate.add, evaluate.run),
    "export": Command("the network in a file for torch.export or ONNX, compared with it", export.add, export.run),
    "plan": Command("what losses over several processes would send, computed", plan.add, plan.run),
    "teacher": Command(
        "write a language model's most likely tokens, to train on without it", others.add_teacher, others.teacher
    ),
    "demo": Command("distil a small student on digits with every method (two minutes)", others.add_demo, others.demo),
    "doctor": Command("what is available here, and what each op runs on", others.add_nothing, others.doctor),
}

TRAINING = ("train", "compare")  # which run in several processes too


def parser() -> Parser:
    top = Parser(prog="kdkernels", description=__doc__)
    top.add_argument("--version", action="version", version=f"kdkernels {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        command.add(sub)
        sub.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    top = parser()
    try:
        args = top.parse_args(with_config(top, argv))
    except ValueError as error:
        print(f"kdkernels {argv[0]}: {error}", file=sys.stderr)
        return 2
    args.line = shlex.join(["kdkernels", *argv])
    try:
        code = args.run(args) or 0
        if args.command in TRAINING:
            _leave(code)
        return code
    except KeyboardInterrupt:
        print(f"kdkernels {args.command}: interrupted; {_saved(args)}", file=sys.stderr)
        return 130  # as shells have it
    except (ValueError, TypeError, OSError, FloatingPointError, BackendError) as error:
        started = isinstance(error, FloatingPointError) or getattr(error, "started", False)
        told = " ".join(str(error).split())
        print(f"kdkernels {args.command}: {told}{f'; {_saved(args)}' if started else ''}", file=sys.stderr)
        return 2


def _leave(code: int) -> None:
    """The end of one of several processes: together, and by gloo without its clean-up.

    Torn down at a process's exit, gloo's threads abort it now and then, although it has done all its work.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not (dist.is_available() and dist.is_initialized()):
        return
    dist.barrier()  # no rank leaves while another still needs it
    if dist.get_backend() == "gloo":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    dist.destroy_process_group()


def _saved(args: argparse.Namespace) -> str:
    """What of a run that ended early is on the disk."""
    if not hasattr(args, "output"):
        return "nothing was saved"
    from ..training.runs import saved

    told = saved(args.output)
    if args.command == "compare":
        return f"{told}; the same command goes on from there"
    return f"{told}; --resume goes on from there" if hasattr(args, "resume") and told.startswith("saved") else told
