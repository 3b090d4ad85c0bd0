"""``kdkernels compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Parser, add_config, add_training, need_extra, rates, seed


def add(parser: Parser) -> None:
    add_config(parser)
    parser.add_argument(
        "--methods", type=methods, default=["all"], help="all, or such as kd,sp:weight=300,kd+sp,amd@0.4 (at this lr)"
    )
    parser.add_argument("--lrs", type=rates, help="learning rates of the student alone, whose best is the baseline")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="how many, or which: 5, or 0,3,7")
    add_training(parser)
    parser.add_argument(
        "--teacher-cache",
        choices=("auto", "yes", "no"),
        default="auto",
        help="keep the teacher's outputs in the output folder, where images are not augmented; auto: on CPUs",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="an interrupted one goes on in it")
    parser.add_argument("--overwrite", action="store_true", help="begin anew")


def methods(text: str) -> list[str]:
    return [method for method in text.split(",") if method]


def seeds(text: str) -> list[int]:
    if "," not in text:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be how many, or which ones, as 0,3,7 or 5, got {text!r}")
        return list(range(int(text)))
    return list(dict.fromkeys(seed(part) for part in text.split(",") if part))


def run(args: argparse.Namespace) -> int:
    need_extra()
    from ..training.compare import compare

    return compare(args)
