"""What every op checks and decides about its arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
REDUCTIONS = ("batchmean", "sum", "none")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any input is fp64, else fp32: what sums are kept in and what the loss is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_pair(student: Tensor, teacher: Tensor, what: str) -> None:
    """Student and teacher are floating-point tensors on one device."""
    for name, x in (("student", student), ("teacher", teacher)):
        check_tensor(f"{what}: {name}", x)
        if x.dtype not in FLOATING:
            raise TypeError(f"{what}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if student.device != teacher.device:
        raise ValueError(f"{what}: student is on {student.device} and teacher on {teacher.device}; move one of them")


def check_rows(student: Tensor, teacher: Tensor, what: str, *, same_width: bool) -> None:
    """Student and teacher are (N, d), with the same d where the two are compared with each other."""
    check_pair(student, teacher, what)
    shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    if student.dim() != 2 or teacher.dim() != 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{what}: student and teacher must be (N, d) with the same N, got {shapes}")
    if same_width and student.shape[1] != teacher.shape[1]:
        raise ValueError(f"{what}: student and teacher must have the same width (project the student), got {shapes}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: float) -> None:
    if type(value) is float:  # nearly always, and much faster than what follows
        return
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's scalars are numbers, tensors are not
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_weight(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be zero or positive and finite, got {value}")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_labels(name: str, labels: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """int64 class indices of that shape on that device."""
    check_tensor(name, labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 class indices, got {labels.dtype}")
    if labels.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"{name} is on {labels.device} and the student's tensors are on {device}; move one of them")


def layer_pairs(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], what: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Two tensors, or two sequences of equally many, as two checked lists."""
    kinds = [isinstance(x, Tensor) for x in (student, teacher)]
    if kinds[0] != kinds[1] or not (kinds[0] or (isinstance(student, Iterable) and isinstance(teacher, Iterable))):
        raise TypeError(
            f"{what}: give two tensors or two sequences of tensors, got {type(student).__name__} "
            f"and {type(teacher).__name__}"
        )
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if len(students) != len(teachers) or not students:
        raise ValueError(f"{what}: needs as many student as teacher layers, got {len(students)} and {len(teachers)}")
    for s, t in zip(students, teachers, strict=True):
        check_pair(s, t, what)
        if s.dim() < 2 or t.dim() < 2 or s.shape[0] != t.shape[0]:
            raise ValueError(
                f"{what}: student and teacher must be (B, ...) with the same B, "
                f"got {tuple(s.shape)} and {tuple(t.shape)}"
            )
        if s.device != students[0].device:
            raise ValueError(f"{what}: layers are on {students[0].device} and {s.device}; move them to one device")
        if s.shape[0] != students[0].shape[0]:
            raise ValueError(
                f"{what}: all layers must have the same B, got {tuple(students[0].shape)} and {tuple(s.shape)}"
            )
        if compute_dtype(s, t) != compute_dtype(students[0], teachers[0]):
            raise TypeError(f"{what}: float64 and other layers cannot be mixed, got {students[0].dtype} and {s.dtype}")
    return students, teachers


def need_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def grad_like(x: Tensor) -> Tensor:
    """The tensor that x's gradient is written to: dense, channels_last where x is, else contiguous."""
    if is_channels_last(x):
        return torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.contiguous_format)
