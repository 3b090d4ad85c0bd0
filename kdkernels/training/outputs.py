"""What a model returns, read: its logits, and the features that it may hand over with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Output = str | int | Callable[[Any], Any]  # a key, field or position of what the model returns, or a function of it


def read(raw: Any, output: Output | None, whose: str) -> tuple[Tensor, list[Tensor] | None]:
    """Logits, and features if the model (or ``output``) returns (logits, [features])."""
    if callable(output):
        raw = output(raw)
    elif output is not None and not isinstance(raw, Tensor):  # many models return less in eval mode
        whole, raw = raw, take(raw, output)
        if raw is None:
            raise ValueError(f"output={output!r}: the {whose} returns {described(whole)}")
    if isinstance(raw, Tensor):
        return raw, None
    if type(raw) in (tuple, list) and len(raw) == 2 and isinstance(raw[0], Tensor) and _features(raw[1]):
        return raw[0], list(raw[1])
    hint = "output='logits'" if "logits" in names(raw) else "output="
    raise TypeError(
        f"the {whose} returns {described(raw)}, and not a tensor of logits or (logits, [features]): say what the "
        f"logits are, with {hint}, a name, a position or a function of what it returns"
    )


def names(raw: Any) -> list[str]:
    """The names by which a container's parts can be had."""
    if isinstance(raw, Mapping):
        return [str(key) for key in raw]
    return list(getattr(raw, "_fields", ()))


def _features(value: Any) -> bool:
    return type(value) in (tuple, list) and len(value) > 0 and all(isinstance(x, Tensor) for x in value)


def take(raw: Any, part: str | int) -> Any:
    """A key, field or position of a container; None where it has no such."""
    try:
        if isinstance(part, int) or isinstance(raw, Mapping):
            return raw[part]
        return getattr(raw, part)
    except (KeyError, IndexError, AttributeError, TypeError):
        return None


def described(raw: Any) -> str:
    if found := names(raw):
        return f"a {type(raw).__name__} with {', '.join(map(repr, found))}"
    if isinstance(raw, (tuple, list)):
        return f"a {type(raw).__name__} of ({', '.join(type(x).__name__ for x in raw)})"
    return f"a {type(raw).__name__}"
