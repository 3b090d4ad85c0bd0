"""Features of named modules, taken by forward hooks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from .outputs import described, take

_PART = re.compile(r"(.+)\[(.+)\]")  # "lstm[0]", "encoder[last_hidden_state]": a part of what a module returns


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's wrapper
            model = model.get_submodule("_orig_mod")
        else:
            return model


class _Features(dict[str, Any]):
    """What the hooks kept. A copy or a pickle of it is empty, as tensors with graphs cannot be copied."""

    def __reduce__(self) -> tuple[type[_Features], tuple[()]]:
        return _Features, ()


class _Keep:
    """A forward hook; unlike a closure it can be pickled, and copied together with its taps."""

    def __init__(self, features: _Features, name: str) -> None:
        self.features, self.name = features, name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.features[self.name] = output


class _Forget:
    """A forward pre-hook of the whole model: features of an earlier run must not stay if a module does not run."""

    def __init__(self, features: _Features) -> None:
        self.features = features

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self.features.clear()


def _near(name: str, known: Iterable[str]) -> str:
    """What a mistyped name may have meant; names further out where nothing is near."""
    names = [other for other in known if other]
    if close := get_close_matches(name, names, 5, 0.5):
        return f"close to it are {close}"
    outer = [other for other in names if other.count(".") < 2]
    return f"it has {outer[:12]}" + (" and more" if len(outer) > 12 else "")


def _tensor(name: str, output: Any, part: str | None) -> Tensor:
    """The tensor in what a module returned."""
    if part is None:
        tensors = [x for x in output if isinstance(x, Tensor)] if isinstance(output, (tuple, list)) else [output]
        x = tensors[0] if len(tensors) == 1 else None
    else:
        x = take(output, int(part) if part.isdecimal() else part)
    if not isinstance(x, Tensor):
        what = described(output) if part is None else f"{described(output)}, of which {part} is no tensor"
        raise TypeError(f"module {name!r} returns {what}: name the tensor in it, as '{name}[0]' or '{name}[field]'")
    return x


class FeatureTaps:
    """Keeps what the named modules return in the last forward pass.

        with FeatureTaps(model, ["layer3", "layer4"]) as taps:
            logits = model(images)
            features = taps.pop()

    The names are those of ``named_modules`` of the bare model, also if it is inside DistributedDataParallel or
    torch.compile. Where a module returns several things, "name[0]" or "name[field]" is one of them; a tuple's only
    tensor needs no such name. A model that was compiled and run before does not call new hooks: tap it first, or call
    ``torch.compiler.reset()``; ``pop`` says so. ``remove`` takes everything off the model.

    A copy or a pickle of these taps together with their model works independently. A copy of only the model (deepcopy,
    AveragedModel, torch.save) has hooks whose features nobody can read and that nothing removes.

    Raises:
        ValueError: a name that the model does not have, or that is given twice.
        RuntimeError: from ``pop``, if a tapped module did not run.
        TypeError: from ``pop``, if a tapped module (or the named part of what it returned) is no tensor.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        names = [names] if isinstance(names, str) else list(names)
        modules = dict(unwrap(model).named_modules(remove_duplicate=False))  # a shared module has several names
        parts = [match.groups() if (match := _PART.fullmatch(name)) else (name, None) for name in names]
        missing = [name for name, _ in parts if name not in modules or not name]
        if missing:
            raise ValueError(f"{type(unwrap(model)).__name__} has no modules {missing}; {_near(missing[0], modules)}")
        if len(set(names)) != len(names):
            raise ValueError(f"a layer is named twice: {list(names)}")
        self.names, self._parts = names, parts
        self._features = _Features()
        tapped = dict.fromkeys(name for name, _ in parts)
        self._hooks = [modules[name].register_forward_hook(_Keep(self._features, name)) for name in tapped]
        if names:
            self._hooks.append(unwrap(model).register_forward_pre_hook(_Forget(self._features)))

    def pop(self) -> list[Tensor]:
        """The features of the last forward pass in the order of the names; they are forgotten here."""
        missing = [name for name, _ in self._parts if name not in self._features]
        if missing:
            raise RuntimeError(
                f"no features from {missing}: the model has not run since, does not use them, or was compiled before "
                "it was tapped (then call torch.compiler.reset())"
            )
        features = [_tensor(name, self._features[name], part) for name, part in self._parts]
        self._features.clear()
        return features

    def remove(self) -> None:
        """Take the hooks off the model and forget what was kept."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._features.clear()

    def __enter__(self) -> FeatureTaps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
