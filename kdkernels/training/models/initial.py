"""How RepDistiller's networks start."""

from __future__ import annotations

from torch import nn


def start(model: nn.Module, head: float | None = None) -> None:
    """Convolutions normal with variance 2 / fan-out (He et al. 2015), norms the identity; ``head``: of linear layers'
    weights the standard deviation, PyTorch's own start without it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and head is not None:
            nn.init.normal_(module.weight, 0, head)
            nn.init.zeros_(module.bias)
