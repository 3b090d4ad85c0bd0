"""Methods as they are written on a command line: ``kd``, ``sp:weight=300``, ``kd+at:layers=stages.1@0.4``."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

from ...corsd_loss import CORSDLoss
from . import METHODS, make_method
from .base import Method

OF_PAIRS = ("layers", "teacher_layers", "adapt")  # options of Distillation: names, several of them with / between
WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Spelling:
    """One method or a mixture, its options, those of its Distillation, and a learning rate of its own."""

    text: str
    parts: list[tuple[str, dict[str, Any]]]
    pairs: dict[str, list[str]] = field(default_factory=dict)
    lr: float | None = None

    def method(self) -> Method:
        """A new one each time: methods have heads for one student."""
        (name, options), *more = self.parts
        return make_method(self.parts) if more else make_method(name, **options)


def parse(text: str) -> Spelling:
    """``METHOD[:OPTION=VALUE...][+METHOD...][@LR]``.

    Options are those of the method, and ``layers``, ``teacher_layers`` and ``adapt`` of its Distillation.

    Raises:
        ValueError: a method or an option that does not exist, with those that do; a value that the method refuses.
    """
    whole, at, rate = text.partition("@")
    parts: list[tuple[str, dict[str, Any]]] = []
    pairs: dict[str, list[str]] = {}
    for part in whole.split("+"):
        name, *settings = part.split(":")
        options = dict(_setting(text, setting) for setting in settings)
        pairs |= {option: str(options.pop(option)).split("/") for option in OF_PAIRS if option in options}
        _check(text, name, options)
        parts.append((name, options))
    if len({name for name, _ in parts}) < len(parts):
        raise ValueError(f"{text} names a method twice")
    spelling = Spelling(text, parts, pairs, _rate(text, rate) if at else None)
    try:
        spelling.method()
    except TypeError as error:  # as "much" for a number
        raise ValueError(f"{text}: {error}") from None
    return spelling


def _setting(text: str, setting: str) -> tuple[str, Any]:
    option, equals, value = setting.partition("=")
    if not equals:
        raise ValueError(f"{text}: options are OPTION=VALUE, got {setting!r}")
    if value.lower() in WORDS:
        return option, WORDS[value.lower()]
    try:
        return option, ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a word
        return option, value


def _check(text: str, name: str, options: dict[str, Any]) -> None:
    if name not in METHODS:
        close = get_close_matches(name, METHODS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"a method is one of {', '.join(METHODS)}, got {name!r} in {text!r}{meant}")
    known = options_of(name)
    if unknown := [option for option in options if option not in known]:
        valid = ", ".join([*known, *OF_PAIRS])
        raise ValueError(f"{text}: {name} has no option {unknown[0]!r}; it has {valid}")


def options_of(name: str) -> list[str]:
    """The names of a method's options."""
    parameters = signature(METHODS[name]).parameters
    if any(p.kind == Parameter.VAR_KEYWORD for p in parameters.values()):  # CORSD hands them on
        parameters = signature(CORSDLoss).parameters
    return [p.name for p in parameters.values() if p.default is not p.empty]


def _rate(text: str, rate: str) -> float:
    try:
        value = float(rate)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{text}: after @ comes a learning rate, a positive number, got {rate!r}")
    return value
