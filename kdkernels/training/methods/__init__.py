"""The methods by name, one file each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from .alone import Alone
from .amd import AMD
from .at import AT
from .base import Batch, Method, Outputs
from .corsd import CORSD
from .dist import DIST
from .ickd import ICKD
from .kd import KD
from .mixed import Mixed
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


Part = str | Method | tuple[str, Mapping[str, Any]]


def make_method(name: str | Method | Sequence[Part], **options: Any) -> Method:
    """The method of that name, with its defaults or with the given options; or a mixture of methods.

    ``make_method("sp", weight=300)``; ``make_method("kd+sp")`` and ``make_method(["kd", ("sp", {"weight": 300})])`` are
    the sum of the two, with cross entropy counted once (see ``Mixed``). A weight may be a schedule: a function of the
    share of the training that is done, 0 to 1, as ``weight=lambda share: 300 * share``. Methods that compare features
    have an option ``warmup``: without a schedule, their weight grows over that share of the training, a fifth. ``fit``
    and the integrations follow both; a loop of your own calls ``distillation.schedule(share)``.

    Raises:
        ValueError: a method that does not exist, invalid options, methods that cannot be mixed.
        TypeError: an option that the method does not have.
    """
    if isinstance(name, Method):
        return name
    if isinstance(name, str) and "+" not in name:
        return _method(name, options)
    if options:
        raise ValueError("options of a mixture go beside their method: ['kd', ('sp', {'weight': 300})]")
    parts = name.split("+") if isinstance(name, str) else name
    return Mixed([_part(part) for part in parts])


def _part(part: Part) -> Method:
    if isinstance(part, Method):
        return part
    if isinstance(part, str):
        return _method(part, {})
    name, options = part
    return _method(name, options)


def _method(name: str, options: Mapping[str, Any]) -> Method:
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {name!r}")
    parameters = signature(METHODS[name]).parameters.items()
    numbers = {option for option, p in parameters if isinstance(p.default, float) and option != "warmup"}
    schedules = {option: value for option, value in options.items() if option in numbers and callable(value)}
    if schedules and any(option == "warmup" for option, _ in parameters):
        options = {"warmup": 0.0, **options}  # a weight with a schedule has no other
    for share in (1.0, 0.5, 0.0):  # the constructor checks the values; that at the start remains
        method = METHODS[name](**{**options, **{option: value(share) for option, value in schedules.items()}})
        if not schedules:
            break
    method.schedules = schedules
    return method


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
    "Mixed",
    "Outputs",
    "Part",
    "make_method",
]
