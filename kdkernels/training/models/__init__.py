"""Networks by name: small ones for first experiments, RepDistiller's for 32 x 32 images, other libraries'."""

from .choose import MODELS, make_model, output_of
from .small import BasicBlock, ConvBlock, ConvNet, medium_student, medium_teacher, small_student, small_teacher
from .weights import load_weights

__all__ = [
    "MODELS",
    "BasicBlock",
    "ConvBlock",
    "ConvNet",
    "load_weights",
    "make_model",
    "medium_student",
    "medium_teacher",
    "output_of",
    "small_student",
    "small_teacher",
]
