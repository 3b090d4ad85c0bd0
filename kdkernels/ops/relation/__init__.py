"""relation: losses of how the rows of a batch lie to each other. op.py is the contract."""

from .op import CC, IRG, PKT, RKD, Relations, relation

__all__ = ["CC", "IRG", "PKT", "RKD", "Relations", "relation"]
