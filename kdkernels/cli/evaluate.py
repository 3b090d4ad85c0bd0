"""``kdkernels eval``: how good the network in a file is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .arguments import MODELS, Parser, add_data, need_extra


def add(parser: Parser) -> None:
    add_weights(parser)
    parser.add_argument("--on", choices=("test", "train"), default="test", help="which images of the data set")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_weights(parser: Parser) -> None:
    """Of eval and export."""
    parser.add_argument("--weights", type=Path, required=True, help=".safetensors or .pth; in a run's folder, which")
    parser.add_argument("--model", help=f"says the rest: {MODELS}")
    add_data(parser)
    parser.set_defaults(data=None)


def run(args: argparse.Namespace) -> None:
    need_extra()
    from ..training.checkpoint_model import complete, load, loader, split_of
    from ..training.evaluation import measure
    from ..training.models import output_of
    from ..training.trackers import make_accelerator

    complete(args)
    split = split_of(args)
    accelerator = make_accelerator("no", 1)
    model = load(args.weights, args.model, split.channels, split.classes).to(accelerator.device)
    found = measure(model, loader(split, args.on == "train", args.workers), output=output_of(args.model))
    if args.json:
        print(json.dumps({"weights": str(args.weights), "model": args.model, "data": args.data, "on": args.on} | found))
        return
    top5 = f", top-5 {found['top5']:.2f} %" if "top5" in found else ""
    print(f"{args.model} on {args.data} ({args.on}): {found['accuracy']:.2f} %{top5}, loss {found['loss']:.4f}")
