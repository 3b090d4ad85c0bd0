"""The thin trainer. It needs the extra "train": pip install '.[train]'."""

from .distillation import Distillation, DistillationOutput
from .methods import METHODS, Batch, Method, Outputs, make_method
from .stages import stage_names
from .taps import FeatureTaps

__all__ = [
    "METHODS",
    "Batch",
    "Distillation",
    "DistillationOutput",
    "FeatureTaps",
    "Method",
    "Outputs",
    "fit",
    "make_method",
    "stage_names",
]


def __getattr__(name: str) -> object:
    if name == "fit":  # the loop alone needs the extra; Distillation works in any trainer without it
        from .loop import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
