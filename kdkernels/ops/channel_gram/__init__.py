"""channel_gram: products of channels, per sample, and the losses that compare them. op.py is the contract."""

from .op import GramPairs, channel_distance, channel_gram

__all__ = ["GramPairs", "channel_distance", "channel_gram"]
