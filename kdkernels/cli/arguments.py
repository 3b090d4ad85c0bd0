"""Options that several commands have, and a parser that says in one line what is wrong and what is valid."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from ..doctor import TRAIN_PACKAGES

MODELS = "a name such as resnet8x4, timm:NAME, torchvision:NAME, hf:NAME or module:callable"


class Parser(argparse.ArgumentParser):
    """Options have to be written out; a mistake is one line, and exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    @property
    def commands(self) -> dict[str, Parser]:
        return next((a.choices for a in self._actions if isinstance(a.choices, dict)), {})

    @property
    def names(self) -> list[str]:
        """The options, without the short ones."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            command = self.commands.get(getattr(parsed, "command", ""), self)
            command.error(f"there is no {rest[0]!r}; {command.valid(rest[0])}")
        return parsed

    def valid(self, given: str) -> str:
        given = given.partition("=")[0]
        begins = [name for name in self.names if name.startswith(given)]
        close = begins or get_close_matches(given, self.names, n=2, cutoff=0.7)
        return f"did you mean {' or '.join(close)}?" if close else f"options are {', '.join(self.names)}"

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: command"):
            message = f"say what to do: {', '.join(self.commands)}, or --help"
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(text)


def count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def rates(text: str) -> list[float]:
    return [rate(part) for part in text.split(",")]


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def need_extra(extra: str = "train", packages: Sequence[str] = TRAIN_PACKAGES) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        what = f"pip install '.[{extra}]' in a checkout of kdkernels"
        raise ValueError(f"this command needs {', '.join(missing)}: {what}")


def add_config(parser: Parser) -> None:
    parser.add_argument("--config", type=Path, help="options from a YAML file, by their names; those given here win")


def add_data(parser: Parser) -> None:
    parser.add_argument(
        "--data", default="digits", help="digits, glyphs, hf:NAME, hf:FOLDER, or an .npz with x_train, y_train, ..."
    )
    parser.add_argument("--image-size", type=positive, help="of hf: data; default: the images' own, or 224")
    parser.add_argument("--label-column", help="of hf: data; default: label or fine_label")
    parser.add_argument("--streaming", action="store_true", help="hf: images are fetched as they are needed")
    parser.add_argument("--workers", type=count, help="processes that read images; default: as the data needs")


def add_training(parser: Parser) -> None:
    """Data, networks and the length of a training."""
    add_data(parser)
    parser.add_argument("--augment", help="none, crop, crop-flip or resized-crop-flip; default: the data set's usual")
    parser.add_argument("--model", help=f"the student: {MODELS}")
    parser.add_argument("--teacher-model", help="the teacher, likewise")
    parser.add_argument("--per-class", type=positive, help="labelled training images per class for the student")
    parser.add_argument(
        "--teacher", type=Path, help="weights of a trained teacher (.safetensors, .pth), or 'pretrained'; or train one"
    )
    parser.add_argument("--teacher-epochs", type=positive, default=26)
    parser.add_argument("--teacher-lr", type=rate, default=0.05)
    parser.add_argument("--epochs", type=positive, default=100)
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--lr", type=rate, default=0.1)
    parser.add_argument("--accumulate", type=positive, default=1, help="micro-batches per step")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
