"""neighbour_correlation: rows of features to RepDistiller's Correlation. op.py is the contract."""

from .op import NeighbourRows, neighbour_correlation

__all__ = ["NeighbourRows", "neighbour_correlation"]
