"""Features of named modules, taken by forward hooks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

# residual networks' stages, and lists of stages: layer1 .. layer4, stage1 .., stages.0 .., blocks.0 ..
_STAGE = re.compile(r"(layer|stage|block)_?\d+|(layers|stages|blocks)\.\d+")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's wrapper
            model = model.get_submodule("_orig_mod")
        else:
            return model


def stage_names(model: nn.Module) -> list[str]:
    """The names of a network's stages, first to last, if they are usual ones (layer1, stages.0, ...)."""
    names = [name for name, _ in unwrap(model).named_modules() if _STAGE.fullmatch(name)]
    if not names:
        children = [name for name, _ in unwrap(model).named_children()]
        raise ValueError(
            f"no stages (layer1, stages.0, ...) found in {type(model).__name__}: name the layers; it has {children}"
        )
    return names


def width(module: nn.Module) -> int | None:
    """Channels of a module's output, read off its last layer that states them; None if no layer does."""
    for layer in reversed(list(module.modules())):
        for name in ("num_features", "out_channels", "out_features"):
            if isinstance(value := getattr(layer, name, None), int):
                return value
    return None


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


class FeatureTaps:
    """Keeps what the named modules return in the last forward pass.

        with FeatureTaps(model, ["layer3", "layer4"]) as taps:
            logits = model(images)
            features = taps.pop()

    The names are those of ``named_modules`` of the bare model, also if it is inside DistributedDataParallel or
    torch.compile. A model that was compiled and run before does not call new hooks: tap it first, or call
    ``torch.compiler.reset()``; ``pop`` says so. ``remove`` takes everything off the model.

    A copy or a pickle of these taps together with their model works independently. A copy of only the model (deepcopy,
    AveragedModel, torch.save) has hooks whose features nobody can read and that nothing removes.

    Raises:
        ValueError: a name that the model does not have, or that is given twice.
        RuntimeError: from ``pop``, if a tapped module did not run.
        TypeError: from ``pop``, if a tapped module did not return a tensor.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        names = [names] if isinstance(names, str) else list(names)
        modules = dict(unwrap(model).named_modules(remove_duplicate=False))  # a shared module has several names
        missing = [name for name in names if name not in modules or not name]
        if missing:
            raise ValueError(
                f"{type(unwrap(model)).__name__} has no modules {missing}; it has {[m for m in modules if m]}"
            )
        if len(set(names)) != len(names):
            raise ValueError(f"a layer is named twice: {list(names)}")
        self.names = names
        self._features = _Features()
        self._hooks = [modules[name].register_forward_hook(_Keep(self._features, name)) for name in names]
        if names:
            self._hooks.append(unwrap(model).register_forward_pre_hook(_Forget(self._features)))

    def pop(self) -> list[Tensor]:
        """The features of the last forward pass in the order of the names; they are forgotten here."""
        missing = [name for name in self.names if name not in self._features]
        if missing:
            raise RuntimeError(
                f"no features from {missing}: the model has not run since, does not use them, or was compiled before "
                "it was tapped (then call torch.compiler.reset())"
            )
        features = [self._features[name] for name in self.names]
        self._features.clear()
        for name, x in zip(self.names, features, strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"module {name!r} returns a {type(x).__name__}; only modules that return a tensor can be tapped"
                )
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
