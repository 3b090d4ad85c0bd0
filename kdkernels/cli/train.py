"""``kdkernels train``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Parser, add_config, add_training, need_extra, seed


def add(parser: Parser) -> None:
    add_config(parser)
    parser.add_argument(
        "--method", default="kd", help="a method of docs/training.md, such as kd, sp:weight=300; several: kd+sp"
    )
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        help="weight of the method's term; sp=300 of one of several",
    )
    add_training(parser)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/train"))
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the output folder holds")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the output folder, if there is one"
    )


def run(args: argparse.Namespace) -> None:
    need_extra()
    from ..training.run import train

    train(args)
