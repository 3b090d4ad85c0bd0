"""correlation: MLKD's correlation of view rows with base rows, made of gram and softmax_kl. op.py is the contract."""

from .op import CorrelationOptions, ViewRows, correlation

__all__ = ["CorrelationOptions", "ViewRows", "correlation"]
