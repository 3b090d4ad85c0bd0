"""gram: the similarities inside a batch. op.py is the contract."""

from .op import ROW_NORMS, LayerPairs, SPOptions, cosine_similarity, gram_of, own_gram, sp_gram

__all__ = ["ROW_NORMS", "LayerPairs", "SPOptions", "cosine_similarity", "gram_of", "own_gram", "sp_gram"]
