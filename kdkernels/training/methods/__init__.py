"""The methods by name, one file each."""

from __future__ import annotations

from typing import Any

from .alone import Alone
from .amd import AMD
from .at import AT
from .base import Batch, Method, Outputs
from .corsd import CORSD
from .dist import DIST
from .ickd import ICKD
from .kd import KD
from .mlkd import MLKD
from .mlld import MLLD
from .nkd import NKD
from .nst import NST
from .relational import CC, IRG, PKT, RKD
from .sp import SP
from .stkd import STKD

METHODS: dict[str, type[Method]] = {
    "alone": Alone,
    "kd": KD,
    "sp": SP,
    "stkd": STKD,
    "nkd": NKD,
    "dist": DIST,
    "mlld": MLLD,
    "amd": AMD,
    "at": AT,
    "nst": NST,
    "ickd": ICKD,
    "mlkd": MLKD,
    "corsd": CORSD,
    "rkd": RKD,
    "pkt": PKT,
    "cc": CC,
    "irg": IRG,
}


def make_method(name: str, **options: Any) -> Method:
    """The method of that name, with its defaults or with the given options."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {name!r}")
    return METHODS[name](**options)


__all__ = [
    "AMD",
    "AT",
    "CC",
    "CORSD",
    "DIST",
    "ICKD",
    "IRG",
    "KD",
    "METHODS",
    "MLKD",
    "MLLD",
    "NKD",
    "NST",
    "PKT",
    "RKD",
    "SP",
    "STKD",
    "Alone",
    "Batch",
    "Method",
    "Outputs",
    "make_method",
]
