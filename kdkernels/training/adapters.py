"""Adapters between features of two networks, by name.

map     tokens (N, L, C) become a map (N, C, H, W) shaped as the images; what is too much for it (a class token) goes. A
        map of channels last (N, H, W, C), as Swin's, becomes one of channels first
pool    the larger map is averaged down to the size of the smaller
conv    the student's channels become the teacher's, by a 1 x 1 convolution that trains with the method's heads
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .layouts import Size, check_map, token_map
from .methods import Outputs

ADAPTERS = ("map", "pool", "conv")


def check_adapters(adapt: str | Sequence[str]) -> tuple[str, ...]:
    names = (adapt,) if isinstance(adapt, str) else tuple(adapt)
    for name in names:
        if name not in ADAPTERS:
            raise ValueError(f"adapt must be of {', '.join(map(repr, ADAPTERS))}, got {name!r}")
    return names


def alike(adapt: Sequence[str], student: Tensor, teacher: Tensor, size: Size | None) -> tuple[Tensor, Tensor]:
    """The pair after "map" and "pool", where these are asked for and needed."""
    if "map" in adapt:
        student, teacher = token_map(student, size), token_map(teacher, size)
    if "pool" in adapt and student.dim() == teacher.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
        height, width = (min(student.shape[axis], teacher.shape[axis]) for axis in (2, 3))
        student, teacher = (F.adaptive_avg_pool2d(x, (height, width)) for x in (student, teacher))
    return student, teacher


def pairs_alike(
    adapt: Sequence[str], student: Outputs, teacher: Outputs | None, size: Size | None
) -> list[tuple[Tensor, Tensor]]:
    """All pairs of features, alike as far as was asked for."""
    assert teacher is not None
    if len(student.features) != len(teacher.features):
        raise ValueError(f"{len(student.features)} student and {len(teacher.features)} teacher features are no pairs")
    return [alike(adapt, s, t, size) for s, t in zip(student.features, teacher.features, strict=True)]


def check_maps(student: Outputs, teacher: Outputs | None, size: Size | None, method: str) -> None:
    """Refuse features that are no maps with channels first."""
    remedy = "adapt='map' makes such of them" if teacher is None else "adapt=['map', 'pool'] makes such of both"
    remedy = remedy if size else "what is no image has no maps: take a method that compares none"
    for whose, outputs in (("student", student), ("teacher", teacher)):
        for x in () if outputs is None else outputs.features:
            check_map(x, size, f"{method}: the {whose}'s features", remedy)


def convolution(student: Tensor, teacher: Tensor) -> nn.Module:
    """What gives a student's feature the teacher's width: for (N, C) and (N, L, C) it is a linear layer."""
    axis = 1 if student.dim() == 4 else -1
    widths = student.shape[axis], teacher.shape[axis]
    if widths[0] == widths[1]:
        return nn.Identity()
    layer = nn.Conv2d(*widths, 1, bias=False) if student.dim() == 4 else nn.Linear(*widths, bias=False)
    return layer.to(student.device, student.dtype)


def hint(error: Exception, adapt: Sequence[str], students: Sequence[Tensor], teachers: Sequence[Tensor]) -> str:
    """What may help a method that refuses these features for their shapes; "" where that is not the matter."""
    if not re.search(r"same (H and W|width|shape)|must match", str(error)):
        return ""
    pairs = list(zip(students, teachers, strict=False))
    hints = []
    if not {"map", "pool"} <= set(adapt) and any(s.shape[2:] != t.shape[2:] for s, t in pairs):
        hints.append("adapt=['map', 'pool'] makes maps of one size")
    if "conv" not in adapt and any(s.shape[1:] != t.shape[1:] for s, t in pairs):
        hints.append("adapt='conv' with an example makes their widths equal")
    return ", ".join(hints)
