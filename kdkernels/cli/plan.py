"""``kdkernels plan``: what the relational losses send over the network; computed, nothing runs."""

from __future__ import annotations

import argparse

from .arguments import Parser, positive

SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
UNITS = ("B", "kB", "MB", "GB", "TB")


def add(parser: Parser) -> None:
    parser.add_argument("--losses", help="of sp, rkd, pkt, cc, irg, mlkd; default: all")
    parser.add_argument("--batch-size", type=positive, default=32, help="images of a rank")
    parser.add_argument("--ranks", type=positive, default=64, help="processes, one for each GPU")
    parser.add_argument("--student", type=shape, default=(512, 7, 7), help="its last stage, as 512x7x7 (ResNet-18)")
    parser.add_argument("--teacher", type=shape, default=(512, 7, 7), help="likewise (ResNet-34)")
    parser.add_argument("--precision", choices=tuple(SIZES), default="fp32", help="of the features")
    parser.add_argument("--details", action="store_true", help="every collective")


def shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(positive(part) for part in text.split("x"))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be sizes such as 512 or 512x7x7, got {text!r}") from None
    return sizes


def run(args: argparse.Namespace) -> None:
    from ..training.traffic import LOSSES, Job

    names = args.losses.split(",") if args.losses else list(LOSSES)
    if unknown := [name for name in names if name not in LOSSES]:
        raise ValueError(f"--losses are of {', '.join(LOSSES)}, got {unknown[0]!r}")
    job = Job(args.batch_size, args.ranks, args.student, args.teacher, SIZES[args.precision])
    print(
        f"Computed, not measured: {job.ranks} ranks of {job.batch} images, {job.whole} in a step; student "
        f"{_sizes(job.student)}, teacher {_sizes(job.teacher)} in {args.precision}.\n"
        "Bytes that one rank sends in one step, all-reduce and all-gather around a ring. Instead: were all features\n"
        "gathered on every rank, which then would compute everything.\n"
    )
    print(f"{'loss':6} {'all_to_all':>12} {'all_reduce':>12} {'all_gather':>12} {'together':>12} {'instead':>12}")
    for name in names:
        collectives = LOSSES[name](job) if job.ranks > 1 else []
        kinds = ("all_to_all", "all_reduce", "all_gather")
        sent = [sum(c.sent(job.ranks) for c in collectives if c.kind == kind) for kind in kinds]
        columns = (c for c in collectives if c.kind == "all_to_all" and "gradient" not in c.what)
        features = sum(c.payload for c in columns) * (job.ranks - 1)
        print(f"{name:6} " + " ".join(f"{_bytes(x):>12}" for x in (*sent, sum(sent), features)))
        for c in collectives if args.details else []:
            print(f"       {c.kind:11} {_bytes(c.sent(job.ranks)):>10}  {c.what}")


def _sizes(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _bytes(number: float) -> str:
    power = 0
    while number >= 1000 and power < len(UNITS) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.0f} B" if power == 0 else f"{number:.3g} {UNITS[power]}"
