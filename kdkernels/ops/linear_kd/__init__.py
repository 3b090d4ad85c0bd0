"""linear_kd: distillation from hidden states, a chunk of tokens at a time. op.py is the contract."""

from .op import linear_kd
from .record import LinearKD, Options, Teacher

__all__ = ["LinearKD", "Options", "Teacher", "linear_kd"]
