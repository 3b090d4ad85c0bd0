"""A network by its name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from types import ModuleType
from typing import Any

from torch import nn

from .mobilenet import MobileNetV2
from .resnet import ResNet, ResNet50
from .shufflenet import ShuffleNetV1, ShuffleNetV2
from .small import medium_student, medium_teacher, small_student, small_teacher
from .vgg import VGG
from .wrn import WideResNet

NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

# each a function of (channels of the images, classes); from resnet8 on RepDistiller's names
MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "small_student": small_student,
    "small_teacher": small_teacher,
    "medium_student": medium_student,
    "medium_teacher": medium_teacher,
    **{f"resnet{depth}": partial(ResNet, depth, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth, WIDE) for depth in (8, 32)},
    "ResNet50": ResNet50,
    **{f"wrn_{depth}_{widen}": partial(WideResNet, depth, widen) for depth in (16, 40) for widen in (1, 2)},
    **{f"vgg{depth}": partial(VGG, depth) for depth in (8, 11, 13, 16, 19)},
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleNetV1,
    "ShuffleV2": ShuffleNetV2,
}
ALSO = "timm:NAME, torchvision:NAME, hf:NAME or module:callable"


def make_model(name: str, in_channels: int, classes: int, pretrained: bool = False) -> nn.Module:
    """A network for images of ``in_channels`` channels and ``classes`` classes, with random weights.

    Args:
        name: one of ``MODELS`` ("-" is as good as "_", and so are capitals and small letters); "timm:NAME",
            "torchvision:NAME", or "hf:NAME" or "hf:FOLDER" for transformers' AutoModelForImageClassification, where
            these are installed; or "module:callable", a function or class of your own, found from the current folder
            on. It is given those of in_channels, classes and num_classes that it takes.
        pretrained: with the published weights of timm, torchvision or hf, and their own head; ``classes`` is then not
            used.

    Raises:
        ValueError: a name that does not exist, a library that is not installed, what the library refuses.
    """
    library, _, rest = name.partition(":")
    if not rest:
        if pretrained:
            raise ValueError(f"there are no published weights of {name!r} here, only of timm:, torchvision: and hf:")
        return _own(name)(in_channels, classes)
    make = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}.get(library)
    if make is not None:
        try:
            return make(rest, in_channels, classes, pretrained)
        except Exception as error:  # of many kinds, for a name, an option or a package that is missing
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{name} cannot be made: {reason}") from error
    if pretrained:
        raise ValueError(f"{name!r} has no published weights: load them in {rest} itself")
    return _callable(library, rest, in_channels, classes)


def output_of(name: str) -> str | None:
    """Where the logits are in what the network returns: ``output=`` of ``Distillation``."""
    return "logits" if name.startswith("hf:") else None


def _own(name: str) -> Callable[[int, int], nn.Module]:
    spelt = {known.lower(): known for known in MODELS}
    key = name.lower().replace("-", "_").replace("shufflenet", "shuffle")
    if key not in spelt:
        close = [spelt[match] for match in get_close_matches(key, spelt, n=3)]
        known = f"did you mean {_either(close)}?" if close else f"there are {', '.join(MODELS)}, {ALSO}"
        raise ValueError(f"there is no model {name!r}: {known}")
    return MODELS[spelt[key]]


def _meant(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=3)
    return f": did you mean {_either(close)}?" if close else ""


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _library(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:  # the latter two, where it was built for another PyTorch
        raise ValueError(f"{package} cannot be imported: {error}") from error


def _timm(name: str, in_channels: int, classes: int, pretrained: bool) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"it has no model {name!r}{_meant(name, timm.list_models())}")
    options = {} if pretrained else {"num_classes": classes}
    return timm.create_model(name, pretrained=pretrained, in_chans=in_channels, **options)


def _torchvision(name: str, in_channels: int, classes: int, pretrained: bool) -> nn.Module:
    models = _library("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"it has no classifier {name!r}{_meant(name, known)}")
    if in_channels != 3:
        raise ValueError(f"its models take images of 3 channels, the data has {in_channels}")
    if pretrained:
        return models.get_model(name, weights="DEFAULT")
    # the heads on the way, which two of them have, are not distilled
    heads = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=classes, **heads)


def _transformers(name: str, in_channels: int, classes: int, pretrained: bool) -> nn.Module:
    transformers = _library("transformers")
    auto = transformers.AutoModelForImageClassification
    if pretrained:
        return auto.from_pretrained(name)
    config = transformers.AutoConfig.from_pretrained(name, num_labels=classes, num_channels=in_channels)
    return auto.from_config(config)


def _callable(module: str, name: str, in_channels: int, classes: int) -> nn.Module:
    if os.getcwd() not in sys.path:  # which a console script has not
        sys.path.insert(0, os.getcwd())
    try:
        make: Any = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module}:{name}: {error}; a model is a name, {ALSO}") from None
    for part in name.split("."):
        if not hasattr(make, part):
            raise ValueError(f"{module} has no {name!r}{_meant(name, dir(make))}")
        make = getattr(make, part)
    if not callable(make):
        raise ValueError(f"{module}:{name} must be a function or class that makes a network, got {make!r}")
    given = {"in_channels": in_channels, "classes": classes, "num_classes": classes}
    try:
        parameters = signature(make).parameters.values()
    except ValueError:  # of a function that is not written in Python
        raise ValueError(f"{module}:{name} makes no network") from None
    unknown = [p.name for p in parameters if p.default is p.empty and p.name not in given and p.kind not in _REST]
    if unknown:
        raise ValueError(f"{module}:{name} needs {', '.join(unknown)}, and is given in_channels, classes, num_classes")
    model = make(**{p.name: given[p.name] for p in parameters if p.name in given})
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module}:{name} returns a {type(model).__name__}, and not a network")
    return model


_REST = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
