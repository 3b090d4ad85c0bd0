"""``kdkernels doctor``, ``demo`` and ``teacher``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Parser, need_extra, positive


def add_demo(parser: Parser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for metrics and demo.png")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo in that folder")


def add_teacher(parser: Parser) -> None:
    parser.add_argument("--model", required=True, help="name or folder for transformers' AutoModelForCausalLM")
    parser.add_argument(
        "--data", type=Path, required=True, help=".txt (a text per line) or .jsonl (text, or input_ids)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder; an interrupted run goes on in it")
    parser.add_argument("--top-k", type=positive, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-length", type=positive, help="longer rows are cut to this many tokens")
    parser.add_argument("--vocab-size", type=positive, help="tokens that exist, if the head has more")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the log-probabilities")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--rows-per-shard", type=positive, default=1024)


def add_nothing(parser: Parser) -> None:
    """A command without options."""


def doctor(args: argparse.Namespace) -> None:
    from ..doctor import report

    for line in report():
        print(line)


def demo(args: argparse.Namespace) -> None:
    need_extra()
    from ..training.demo import run_demo

    run_demo(args.output, args.seeds, overwrite=args.overwrite)


def teacher(args: argparse.Namespace) -> None:
    need_extra("hf", ("transformers", "safetensors"))
    from ..training.run_teacher import write

    write(args)
