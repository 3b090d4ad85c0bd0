"""``kdkernels export``: the network in a file for programs that know nothing of its code."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Parser, need_extra, positive
from .evaluate import add_weights
from .plan import shape


def add(parser: Parser) -> None:
    add_weights(parser)
    parser.add_argument("--output", type=Path, required=True, help="a new file: .pt2 (torch.export) or .onnx")
    parser.add_argument("--shape", type=shape, help="of an image, as 3x32x32, and")
    parser.add_argument("--classes", type=positive, help="how many there are: instead of --data")


def run(args: argparse.Namespace) -> None:
    need_extra()
    from ..training.export import FORMATS, export

    if args.output.suffix not in FORMATS:
        raise ValueError(f"--output must end in {' or '.join(FORMATS)}, got {str(args.output)!r}")
    if (args.shape is None) != (args.classes is None):
        raise ValueError("--shape and --classes go together")
    print(export(args))
