"""The names of a network's stages, by how the usual families are built, and pairs of them for two networks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import nn

from .taps import unwrap

# numbered siblings: layer1 .. layer4, stage2 .., block1 .., s1 ..
_NUMBERED = re.compile(r"(layer|stage|block|s)_?\d+")
# containers whose children are the stages: stages.0, blocks.0, encoder.layer.0, transformer.h.0, encoder.layers.x_0
_LISTS = ("stages", "layers", "layer", "blocks", "h")
# a flat list of a convolutional network: its stages end where the map gets smaller
_FLAT = 8  # a list of more children with strides among them is flat
_SHRINKS = re.compile(r"merging|downsample|transition", re.IGNORECASE)

Layers = str | Sequence[str] | Mapping[str, str]


def stage_names(model: nn.Module) -> list[str]:
    """The names of a network's stages, first to last.

    Found are layer1 .., stage1 .., block1 ..; the children of stages, layers, layer, blocks and h (timm, transformers,
    torchvision's transformers); and in flat lists of layers (torchvision's ``features``) the last layer before each
    that makes the map smaller, and the last one. Each layer of a transformer is a stage.

    Raises:
        ValueError: nothing of the kind.
    """
    bare = unwrap(model)
    modules = sorted(bare.named_modules(), key=lambda item: item[0].count(".") if item[0] else -1)
    for name, module in modules:  # the shallowest first
        prefix = f"{name}." if name else ""
        children = list(module._modules)
        if len(numbered := [child for child in children if _NUMBERED.fullmatch(child)]) > 1:
            return [prefix + child for child in numbered]
        if name.rpartition(".")[2] in (*_LISTS, "features") and len(children) > 1:
            ends = _before_the_map_shrinks(module)
            flat = len(ends) > 1 and (name.endswith("features") or len(children) > _FLAT)
            return [prefix + child for child in (ends if flat else children)]
    if len(ends := _before_the_map_shrinks(bare)) > 1:
        return ends
    if single := [name for name, _ in modules if _NUMBERED.fullmatch(name)]:
        return single
    children = [name for name, _ in bare.named_children()]
    raise ValueError(
        f"no stages (layer1, stages.0, encoder.layer.0, ...) found in {type(bare).__name__}: name the layers; it has "
        f"{children}"
    )


def _before_the_map_shrinks(module: nn.Module) -> list[str]:
    """The children in front of one with a stride, and the last one that is no pooling and no head."""
    body: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if isinstance(child, (nn.AdaptiveAvgPool2d, nn.Linear, nn.Dropout)):  # here the head begins
            break
        if name.lower().startswith("aux"):  # a head on the way
            continue
        body.append((name, child))
    ends = [before for (before, _), (_, child) in pairwise(body) if _shrinks(child)]
    if ends and not isinstance(body[-1][1], (nn.MaxPool2d, nn.AvgPool2d)):
        ends.append(body[-1][0])
    return ends


def _shrinks(module: nn.Module) -> bool:
    if _SHRINKS.search(type(module).__name__):
        return True
    strided = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    strides = [m.stride for m in module.modules() if isinstance(m, strided)]
    return any(max(s) > 1 if isinstance(s, tuple) else s > 1 for s in strides)


def pair_layers(
    layers: Layers | None, teacher_layers: str | Sequence[str] | None
) -> tuple[list[str] | None, list[str] | None]:
    """The student's and the teacher's layers as they were named, None where they were not."""
    if isinstance(layers, Mapping):
        if teacher_layers is not None:
            raise ValueError("layers={student: teacher} names the teacher's layers already: leave out teacher_layers")
        return list(layers), list(layers.values())
    students = [layers] if isinstance(layers, str) else None if layers is None else list(layers)
    teachers = [teacher_layers] if isinstance(teacher_layers, str) else teacher_layers
    return students, students if teachers is None else list(teachers)


def fewer(model: nn.Module, names: Sequence[str], count: int) -> list[str]:
    """``count`` of a network's stages: the last ones where maps get smaller from stage to stage, else evenly spread."""
    return list(names[len(names) - count :]) if _narrows(model) else _evenly(names, count)


def at_most(model: nn.Module, names: Sequence[str], count: int) -> list[str]:
    """A network's stages, and of those that do not make their maps smaller, as a transformer's layers, ``count``."""
    return list(names) if _narrows(model) or len(names) <= count else _evenly(names, count)


def _narrows(model: nn.Module) -> bool:
    return sum(_shrinks(module) for module in model.modules() if not module._modules) > 1


def _evenly(names: Sequence[str], count: int) -> list[str]:
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]
