"""The command line: ``kdkernels train | teacher | demo | doctor``."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .doctor import TRAIN_PACKAGES
from .ops.backend import BackendError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="kdkernels", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="what is available here, and what each op runs on")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="distil a small student on digits with every method (about two minutes)")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for metrics and demo.png")
    demo.add_argument("--seeds", type=_positive, default=3)
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in that folder")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train one student with one method")
    train.add_argument("--method", default="kd", help="a method of docs/training.md, such as kd, sp; several: kd+sp")
    train.add_argument(
        "--weight",
        action="append",
        default=[],
        help="weight of the method's term; sp=300 of one of several",
    )
    _data_and_models(train)
    train.add_argument("--per-class", type=_positive, help="labelled training images per class for the student")
    train.add_argument(
        "--teacher", type=Path, help="weights of a trained teacher (.safetensors, .pth), or 'pretrained'; or train one"
    )
    train.add_argument("--teacher-epochs", type=_positive, default=26)
    train.add_argument("--epochs", type=_positive, default=100)
    train.add_argument("--batch-size", type=_positive, default=32)
    train.add_argument("--lr", type=_rate, default=0.1)
    train.add_argument("--accumulate", type=_positive, default=1, help="micro-batches per step")
    train.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--output", type=Path, default=Path("runs/train"))
    train.add_argument("--overwrite", action="store_true", help="replace the run that the output folder holds")
    train.add_argument("--resume", action="store_true", help="go on with the run in the output folder, if there is one")
    train.set_defaults(run=_train)

    teacher = commands.add_parser("teacher", help="write a language model's most likely tokens, to train on without it")
    teacher.add_argument("--model", required=True, help="name or folder for transformers' AutoModelForCausalLM")
    teacher.add_argument(
        "--data", type=Path, required=True, help=".txt (a text per line) or .jsonl (text, or input_ids)"
    )
    teacher.add_argument("--output", type=Path, required=True, help="folder; an interrupted run goes on in it")
    teacher.add_argument("--top-k", type=_positive, default=64)
    teacher.add_argument("--temperature", type=float, default=1.0)
    teacher.add_argument("--max-length", type=_positive, help="longer rows are cut to this many tokens")
    teacher.add_argument("--vocab-size", type=_positive, help="tokens that exist, if the head has more")
    teacher.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the log-probabilities")
    teacher.add_argument("--batch-size", type=_positive, default=8)
    teacher.add_argument("--rows-per-shard", type=_positive, default=1024)
    teacher.set_defaults(run=_teacher)
    return top


def _data_and_models(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "--data", default="digits", help="digits, glyphs, hf:NAME, hf:FOLDER, or an .npz with x_train, y_train, ..."
    )
    train.add_argument("--image-size", type=_positive, help="of hf: data; default: the images' own, or 224")
    train.add_argument("--label-column", help="of hf: data; default: label or fine_label")
    train.add_argument("--streaming", action="store_true", help="hf: images are fetched as they are needed")
    train.add_argument("--augment", help="none, crop, crop-flip or resized-crop-flip; default: the data set's usual")
    train.add_argument("--workers", type=_count, help="processes that read images; default: as the data needs")
    models = "a name such as resnet8x4, timm:NAME, torchvision:NAME, hf:NAME or module:callable"
    train.add_argument("--model", help=f"the student: {models}")
    train.add_argument("--teacher-model", help="the teacher, likewise")


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(text)


def _need_extra(extra: str = "train", packages: Sequence[str] = TRAIN_PACKAGES) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        what = f"pip install '.[{extra}]' in a checkout of kdkernels"
        raise ValueError(f"this command needs {', '.join(missing)}: {what}")


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _doctor(args: argparse.Namespace) -> None:
    from .doctor import report

    for line in report():
        print(line)


def _demo(args: argparse.Namespace) -> None:
    _need_extra()
    from .training.demo import run_demo

    run_demo(args.output, args.seeds, overwrite=args.overwrite)


def _train(args: argparse.Namespace) -> None:
    _need_extra()
    from .training.run import train

    train(args)
    _leave()


def _teacher(args: argparse.Namespace) -> None:
    _need_extra("hf", ("transformers", "safetensors"))
    from .training.run_teacher import write

    write(args)


def _leave() -> None:
    """The end of one of several processes: together, and by gloo without its clean-up.

    Torn down at a process's exit, gloo's threads abort it now and then, although it has done all its work.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return
    dist.barrier()  # no rank leaves while another still needs it
    if dist.get_backend() == "gloo":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print(f"kdkernels {args.command}: interrupted; {_saved(args)}", file=sys.stderr)
        return 130  # as shells have it
    except (ValueError, TypeError, OSError, FloatingPointError, BackendError) as error:
        started = isinstance(error, FloatingPointError) or getattr(error, "started", False)
        print(f"kdkernels {args.command}: {error}{f'; {_saved(args)}' if started else ''}", file=sys.stderr)
        return 2
    return 0


def _saved(args: argparse.Namespace) -> str:
    """What of a run that ended early is on the disk."""
    if not hasattr(args, "output"):
        return "nothing was saved"
    from .training.runs import saved

    told = saved(args.output)
    return f"{told}; --resume goes on from there" if hasattr(args, "resume") and told.startswith("saved") else told
