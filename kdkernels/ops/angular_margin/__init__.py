"""angular_margin: the distance between the angular maps of two networks' activations. op.py is the contract."""

from .op import ActivationPairs, angular_margin

__all__ = ["ActivationPairs", "angular_margin"]
