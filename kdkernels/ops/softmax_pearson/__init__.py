"""softmax_pearson: the correlation of two networks' probabilities by rows and by columns. op.py is the contract."""

from .op import CorrelatedRows, softmax_pearson

__all__ = ["CorrelatedRows", "softmax_pearson"]
