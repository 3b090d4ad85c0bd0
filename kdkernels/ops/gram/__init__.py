"""Batch Gram matrices, the similarity-preserving loss on them, and cosine similarities."""

from .op import cosine_similarity, sp_gram

__all__ = ["cosine_similarity", "sp_gram"]
