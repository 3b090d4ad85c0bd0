"""nkd: rows of logits with a label each to normalised knowledge distillation. op.py is the contract."""

from .op import LabelledRows, nkd

__all__ = ["LabelledRows", "nkd"]
