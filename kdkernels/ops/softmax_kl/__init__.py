"""softmax_kl: rows of logits to weighted cross-entropy and divergence terms. op.py is the contract."""

from .op import NO_LABEL, Labels, Rows, Terms, softmax_kl

__all__ = ["NO_LABEL", "Labels", "Rows", "Terms", "softmax_kl"]
