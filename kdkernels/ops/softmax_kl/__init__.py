"""Softmax, KL divergence and mixed-label cross entropy over rows of logits."""

from .op import softmax_kl

__all__ = ["softmax_kl"]
