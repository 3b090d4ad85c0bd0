"""Normalised angular margins of attention maps."""

from .op import angular_margin

__all__ = ["angular_margin"]
