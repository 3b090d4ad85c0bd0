"""The methods by name, one file each."""

from __future__ import annotations

from typing import Any

from .alone import Alone
from .amd import AMD
from .at import AT
from .base import Batch, Method, Outputs
from .corsd import CORSD
from .ickd import ICKD
from .kd import KD
from .mlkd import MLKD
from .nst import NST
from .sp import SP
from .stkd import STKD

METHODS: dict[str, type[Method]] = {
    "alone": Alone,
    "kd": KD,
    "sp": SP,
    "stkd": STKD,
    "amd": AMD,
    "at": AT,
    "nst": NST,
    "ickd": ICKD,
    "mlkd": MLKD,
    "corsd": CORSD,
}


def make_method(name: str, **options: Any) -> Method:
    """The method of that name, with its defaults or with the given options."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {name!r}")
    return METHODS[name](**options)


__all__ = [
    "AMD",
    "AT",
    "CORSD",
    "ICKD",
    "KD",
    "METHODS",
    "MLKD",
    "NST",
    "SP",
    "STKD",
    "Alone",
    "Batch",
    "Method",
    "Outputs",
    "make_method",
]
