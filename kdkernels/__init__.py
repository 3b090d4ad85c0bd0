"""kdkernels: exact, fast knowledge-distillation losses, one function call on two tensors."""

from .amd_loss import AMDLoss, amd_loss
from .kd_loss import KDLoss, kd_loss
from .ops.backend import BackendError, use_backend
from .sp_loss import SPLoss, sp_loss
from .stkd_loss import STKDLoss, cutmix, mixup, stkd_loss

__version__ = "0.1.0"

__all__ = [
    "AMDLoss",
    "BackendError",
    "KDLoss",
    "SPLoss",
    "STKDLoss",
    "__version__",
    "amd_loss",
    "cutmix",
    "kd_loss",
    "mixup",
    "sp_loss",
    "stkd_loss",
    "use_backend",
]
