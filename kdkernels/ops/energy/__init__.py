"""energy: the maps of |A|^p over channels, and how far two networks' maps are apart. op.py is the contract."""

from .op import Activation, AttentionPairs, attention, energy

__all__ = ["Activation", "AttentionPairs", "attention", "energy"]
