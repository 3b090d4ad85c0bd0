"""Adapters between features of two networks, by name.

map     tokens (N, L, C) become a map (N, C, H, H); what is too much for a square (a class token) goes. A map of
        channels last (N, H, H, C), as Swin's, becomes one of channels first
pool    the larger map is averaged down to the size of the smaller
conv    the student's channels become the teacher's, by a 1 x 1 convolution that trains with the method's heads
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

ADAPTERS = ("map", "pool", "conv")


def check_adapters(adapt: str | Sequence[str]) -> tuple[str, ...]:
    names = (adapt,) if isinstance(adapt, str) else tuple(adapt)
    for name in names:
        if name not in ADAPTERS:
            raise ValueError(f"adapt must be of {', '.join(map(repr, ADAPTERS))}, got {name!r}")
    return names


def token_map(x: Tensor) -> Tensor:
    """(N, L, C) tokens as a map (N, C, H, H); the first ones go if there are too many for a square."""
    if x.dim() == 4 and x.shape[1] == x.shape[2] != x.shape[3]:
        return x.permute(0, 3, 1, 2)
    if x.dim() != 3:
        return x
    side = math.isqrt(x.shape[1])
    return x[:, x.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))


def alike(adapt: Sequence[str], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The pair after "map" and "pool", where these are asked for and needed."""
    if "map" in adapt:
        student, teacher = token_map(student), token_map(teacher)
    if "pool" in adapt and student.dim() == teacher.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
        height, width = (min(student.shape[axis], teacher.shape[axis]) for axis in (2, 3))
        student, teacher = (F.adaptive_avg_pool2d(x, (height, width)) for x in (student, teacher))
    return student, teacher


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
