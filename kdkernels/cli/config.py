"""Options from a YAML file, as if they stood in front of those on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import Parser, need_extra


def with_config(parser: Parser, argv: Sequence[str]) -> list[str]:
    """The command line with the options of its ``--config`` file in it, right behind the command.

    Raises:
        ValueError: no such file, no YAML, no mapping, or a name that is no option of the command.
    """
    argv = list(argv)
    command = parser.commands.get(argv[0]) if argv else None
    path = _given(argv)
    if command is None or path is None or "--config" not in command.names:
        return argv
    need_extra(packages=("yaml",))
    return [argv[0], *_as_flags(command, path, _read(path)), *argv[1:]]


def _given(argv: Sequence[str]) -> Path | None:
    for i, word in enumerate(argv):
        if word.startswith("--config="):
            return Path(word.partition("=")[2])
        if word == "--config" and i + 1 < len(argv):
            return Path(argv[i + 1])
    return None


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"--config {path}: {reason}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"--config {path} must hold OPTION: VALUE lines, got a {type(found).__name__}")
    return found


def _as_flags(command: Parser, path: Path, options: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        flag = f"--{str(name).replace('_', '-')}"
        if flag not in command.names or flag in ("--help", "--config"):
            raise ValueError(f"--config {path}: there is no {name!r}; {command.valid(flag)}")
        flags += _flag(f"--config {path}: {name}", command, flag, value)
    return flags


def _flag(where: str, command: Parser, flag: str, value: Any) -> list[str]:
    action = command._option_string_actions[flag]
    if action.nargs == 0:  # a flag without a value
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}")
        return [flag] if value else []
    if value is None:
        return []
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        if isinstance(action.default, list) and not action.type:  # which may be given several times
            return [f"{flag}={item}" for item in value]
        tail = "," * (len(value) == 1)  # one of a list, and not how many
        return [f"{flag}={','.join(map(str, value))}{tail}"]
    if isinstance(value, (list, dict)):
        raise ValueError(f"{where} must be one value or a list of them, got {value!r}")
    return [f"{flag}={'no' if value is False else value}"]  # no is a word of ours, and YAML's for false
