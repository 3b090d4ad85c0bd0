"""multi_level: rows of logits compared at several temperatures, as rows and by their Grams. op.py is the contract."""

from .op import Levels, multi_level

__all__ = ["Levels", "multi_level"]
