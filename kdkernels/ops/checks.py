"""What public functions check about their arguments, once, and what ops decide from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
HALF = (torch.float16, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "none")
LAYER_REDUCTIONS = ("sum", "mean", "none")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any input is fp64, else fp32: what sums are kept in and what the loss is."""
    for t in tensors:
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def may_hold(condition: Tensor) -> bool:
    """False if the condition holds nowhere. Only on a CPU is that looked up: elsewhere the host would wait for it."""
    return condition.device.type != "cpu" or bool(condition.any())


def check_pair(student: Tensor, teacher: Tensor, caller: str) -> None:
    """Student and teacher are floating-point tensors on one device."""
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{caller}: {name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in FLOATING:
            raise TypeError(f"{caller}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if student.device != teacher.device:
        raise ValueError(f"{caller}: student is on {student.device} and teacher on {teacher.device}; move one of them")


def check_rows(student: Tensor, teacher: Tensor, caller: str, *, same_width: bool) -> None:
    """Student and teacher are (N, d), with the same d where the two are compared with each other."""
    check_pair(student, teacher, caller)
    shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    if student.dim() != 2 or teacher.dim() != 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{caller}: student and teacher must be (N, d) with the same N, got {shapes}")
    if same_width and student.shape[1] != teacher.shape[1]:
        raise ValueError(f"{caller}: student and teacher must have the same width (project the student), got {shapes}")


def check_batches(student: Tensor, teacher: Tensor, caller: str) -> None:
    """Student and teacher are (B, ...) with the same B."""
    check_pair(student, teacher, caller)
    if student.dim() < 2 or teacher.dim() < 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{caller}: student and teacher must be (B, ...) with the same B, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's scalars are numbers, tensors are not
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_positive(caller: str = "", /, **numbers: float) -> None:
    """Every number is positive and finite: ``check_positive(temperature=temperature)``."""
    for name, value in numbers.items():
        if type(value) is not float:  # nearly always it is one
            check_number(_named(caller, name), value)
        if not 0 < value < math.inf:
            raise ValueError(f"{_named(caller, name)} must be positive and finite, got {value}")


def check_weight(caller: str = "", /, **numbers: float) -> None:
    """Every number is zero or positive, and finite."""
    for name, value in numbers.items():
        if type(value) is not float:
            check_number(_named(caller, name), value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{_named(caller, name)} must be zero or positive and finite, got {value}")


def _named(caller: str, name: str) -> str:
    return f"{caller}: {name}" if caller else name


def check_reduction(reduction: object, caller: str, *, per_sample: bool = True, batchmean: bool = False) -> str:
    """The reduction: "mean", "sum", or "none" if a sample has a value; "batchmean" is "mean" where that is the same."""
    if reduction == "mean" or reduction == "sum" or (per_sample and reduction == "none"):
        return str(reduction)
    if reduction == "batchmean" and batchmean:
        return "mean"
    valid = "'mean', 'sum' or 'none'" if per_sample else "'mean' or 'sum'"
    hint = ""
    if reduction == "none":
        hint = ": there is no value of a single sample"
    elif reduction == "batchmean":
        hint = ": divide the 'sum' by the batch if that is what you want"
    raise ValueError(f"{caller}: reduction must be {valid}, got {reduction!r}{hint}")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_index(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_labels(name: str, labels: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """int64 class indices of that shape on that device."""
    check_tensor(name, labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 class indices, got {labels.dtype}")
    if labels.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"{name} is on {labels.device} and the student's tensors are on {device}; move one of them")


def check_label_values(name: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise for a label out of range. On the CPU alone: reading values would stall an accelerator."""
    bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
    if bad.numel():
        raise ValueError(f"{name} has label {int(bad[0])}; valid are 0..{classes - 1}, and {ignore_index} to ignore")


def layer_pairs(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], caller: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Two tensors, or two sequences of equally many, as two checked lists; the teacher's without gradient."""
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        students, teachers = [student], [teacher]
    elif _is_sequence(student) and _is_sequence(teacher):
        students, teachers = list(student), list(teacher)
    else:
        raise TypeError(
            f"{caller}: give two tensors or two sequences of tensors, got {type(student).__name__} "
            f"and {type(teacher).__name__}"
        )
    if len(students) != len(teachers) or not students:
        raise ValueError(f"{caller}: needs as many student as teacher layers, got {len(students)} and {len(teachers)}")
    constants = []
    for s, t in zip(students, teachers, strict=True):
        check_batches(s, t, caller)
        constants.append(t.detach())
    if len(students) > 1:
        _check_layers(students, teachers, caller)
    return students, constants


def _is_sequence(x: object) -> bool:
    return isinstance(x, Iterable) and not isinstance(x, Tensor)


def _check_layers(students: list[Tensor], teachers: list[Tensor], caller: str) -> None:
    """All layers are of one batch, on one device, in fp64 or not."""
    first = students[0]
    for s, t in zip(students, teachers, strict=True):
        if s.device != first.device:
            raise ValueError(f"{caller}: layers are on {first.device} and {s.device}; move them to one device")
        if s.shape[0] != first.shape[0]:
            raise ValueError(
                f"{caller}: all layers must have the same B, got {tuple(first.shape)} and {tuple(s.shape)}"
            )
        if compute_dtype(s, t) != compute_dtype(first, teachers[0]):
            raise TypeError(f"{caller}: float64 and other layers cannot be mixed, got {first.dtype} and {s.dtype}")


def layer_numbers(
    layer_weights: Sequence[float] | str, caller: str, *, layers: int | None = None, names: str = "None"
) -> list[float]:
    """One number per layer, checked. ``names`` is what else may be given."""
    if isinstance(layer_weights, str) or not isinstance(layer_weights, Iterable):
        kind = ValueError if isinstance(layer_weights, str) else TypeError
        raise kind(f"{caller}: layer_weights must be {names} or one number per layer, got {layer_weights!r}")
    weights = list(layer_weights)
    for weight in weights:
        check_weight(caller, layer_weights=weight)
    if layers is not None and len(weights) != layers:
        raise ValueError(f"{caller}: layer_weights has {len(weights)} numbers for {layers} layers")
    return [float(weight) for weight in weights]


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def grad_like(x: Tensor) -> Tensor:
    """The tensor that x's gradient is written to: dense, channels_last where x is, else contiguous."""
    if is_channels_last(x):
        return torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.contiguous_format)
