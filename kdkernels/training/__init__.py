"""The thin trainer. It needs the extra "train": pip install '.[train]'."""

from .callbacks import Callback
from .distillation import Distillation, DistillationOutput
from .methods import METHODS, Batch, Method, Outputs, make_method
from .sequence import SequenceDistillation
from .sequence_data import SequenceCollator, token_rows
from .stages import stage_names
from .taps import FeatureTaps

__all__ = [
    "METHODS",
    "Batch",
    "Callback",
    "Distillation",
    "DistillationOutput",
    "FeatureTaps",
    "Method",
    "Outputs",
    "SequenceCollator",
    "SequenceDistillation",
    "TeacherCache",
    "fit",
    "make_method",
    "stage_names",
    "token_rows",
    "write_teacher_cache",
]


def __getattr__(name: str) -> object:
    if name == "fit":  # the loop alone needs the extra; Distillation works in any trainer without it
        from .loop import fit

        return fit
    if name in ("TeacherCache", "write_teacher_cache"):  # these need safetensors
        from . import teacher_cache

        return getattr(teacher_cache, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
