"""kdkernels: exact, fast knowledge-distillation losses, one function call on two tensors."""

from .accumulation import cached_backward
from .amd_loss import AMDLoss, amd_loss
from .corsd_loss import CORSDLoss, CORSDWeights, corsd_loss
from .kd_loss import KDLoss, kd_loss
from .mlkd_loss import MLKDLoss, alignment_loss, correlation_loss, mlkd_loss
from .ops.backend import BackendError, use_backend
from .sp_loss import SPLoss, sp_loss
from .stkd_loss import STKDLoss, cutmix, mixup, stkd_loss
from .supervised_contrastive_loss import supervised_contrastive_loss

__version__ = "0.1.0"

__all__ = [
    "AMDLoss",
    "BackendError",
    "CORSDLoss",
    "CORSDWeights",
    "KDLoss",
    "MLKDLoss",
    "SPLoss",
    "STKDLoss",
    "__version__",
    "alignment_loss",
    "amd_loss",
    "cached_backward",
    "correlation_loss",
    "corsd_loss",
    "cutmix",
    "kd_loss",
    "mixup",
    "mlkd_loss",
    "sp_loss",
    "stkd_loss",
    "supervised_contrastive_loss",
    "use_backend",
]
