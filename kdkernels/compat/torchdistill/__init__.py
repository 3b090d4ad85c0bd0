"""torchdistill's losses (github.com/yoshitomo-matsubara/torchdistill, 1.1).

Importing this module registers them in torchdistill's registry, where torchdistill is installed, under its own names,
so that a configuration needs one line and no other change:

    dependencies:
      - name: 'kdkernels.compat.torchdistill'
"""

from __future__ import annotations

import importlib.util

from .features import ATLoss, CCKDLoss, ChSimLoss, FSPLoss, PKTLoss, RKDLoss, SPKDLoss
from .logits import KDLoss, LogitStdKDLoss, SKDInstanceLoss

LOSSES = (
    ATLoss,
    CCKDLoss,
    ChSimLoss,
    FSPLoss,
    KDLoss,
    LogitStdKDLoss,
    PKTLoss,
    RKDLoss,
    SKDInstanceLoss,
    SPKDLoss,
)


def register() -> None:
    """Replace torchdistill's own in its registry; called on import if torchdistill is installed."""
    from torchdistill.losses import mid_level  # noqa: F401  its own register themselves first, or they would replace ours
    from torchdistill.losses.registry import register_mid_level_loss

    for loss in LOSSES:
        register_mid_level_loss(loss)


if importlib.util.find_spec("torchdistill") is not None:
    register()
