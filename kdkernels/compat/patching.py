"""Put our losses in the place of another library's own, in its imported modules, and take them out again."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any


def bare_signature(function: Any) -> str:
    """The arguments with their defaults, without annotations."""
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


class Patch:
    """Replaces the losses of one package.

    Args:
        package: its name, as it is imported.
        known: by name, the signatures that are known and our loss for each. A function of that name with any other
            signature, as forks have them, is left.
        reasons: by name, why another loss is left.

    A name is replaced in all modules of the package. What other modules imported earlier is theirs, and is left.
    """

    def __init__(self, package: str, known: Mapping[str, Mapping[str, Any]], reasons: Mapping[str, str]) -> None:
        self.package, self.known, self.reasons = package, known, reasons
        self.originals: list[tuple[ModuleType, str, Any]] = []

    def apply(self) -> None:
        """Replace and print what was replaced, what was left and why."""
        modules = self._modules()
        for module in modules:
            for name, theirs in list(vars(module).items()):
                if getattr(theirs, "__module__", None) != module.__name__:
                    continue  # imported from elsewhere, or ours already
                if name in self.known:
                    self._replace(modules, f"{module.__name__}.{name}", theirs, self.known[name])
                elif name in self.reasons:
                    _say("left", f"{module.__name__}.{name}: {self.reasons[name]}")

    def undo(self) -> None:
        """Put everything back."""
        while self.originals:
            module, name, theirs = self.originals.pop()
            setattr(module, name, theirs)

    def _modules(self) -> list[ModuleType]:
        try:
            importlib.import_module(self.package)
        except ImportError as error:
            raise ImportError(
                f"patch() found no {self.package}: run from its repository's folder, or install it ({error})"
            ) from error
        return [sys.modules[name] for name in sorted(sys.modules) if f"{name}.".startswith(f"{self.package}.")]

    def _replace(self, modules: list[ModuleType], path: str, theirs: Any, known: Mapping[str, Any]) -> None:
        signature = bare_signature(theirs)
        if signature not in known:
            _say("left", f"{path}{signature}: of that name, ours takes {' or '.join(known)}")
            return
        for holder, name in _holders(theirs):
            if holder in modules:
                self.originals.append((holder, name, theirs))
                setattr(holder, name, known[signature])
            else:
                _say("left", f"{holder.__name__}.{name}: imported before patch() was called")
        _say("replaced", f"{path}{signature}")


def _holders(thing: Any) -> Iterator[tuple[ModuleType, str]]:
    """Every module that has it, and its name there."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is thing:
                yield module, name


def _say(what: str, line: str) -> None:
    print(f"kdkernels: {what:8} {line}")
