"""kdkernels: exact, fast knowledge-distillation losses, one function call on two tensors."""

from .accumulation import cached_backward
from .alignment_loss import AlignmentLoss, alignment_loss
from .amd_loss import AMDLoss, amd_loss
from .correlation_loss import CorrelationLoss, correlation_loss
from .corsd_loss import CORSDLoss, corsd_loss
from .cwd_loss import CWDLoss, cwd_loss
from .dist_loss import DISTLoss, dist_loss
from .kd_loss import KDLoss, kd_loss
from .mixing import cutmix, mixup
from .mlkd_loss import MLKDLoss, mlkd_loss
from .mlld_loss import MLLDLoss, mlld_loss
from .nkd_loss import NKDLoss, nkd_loss
from .ops.backend import BackendError, use_backend
from .sp_loss import SPLoss, sp_loss
from .stkd_loss import STKDLoss, stkd_loss
from .supervised_contrastive_loss import SupervisedContrastiveLoss, supervised_contrastive_loss

__version__ = "0.1.0"

__all__ = [
    "AMDLoss",
    "AlignmentLoss",
    "BackendError",
    "CORSDLoss",
    "CWDLoss",
    "CorrelationLoss",
    "DISTLoss",
    "KDLoss",
    "MLKDLoss",
    "MLLDLoss",
    "NKDLoss",
    "SPLoss",
    "STKDLoss",
    "SupervisedContrastiveLoss",
    "__version__",
    "alignment_loss",
    "amd_loss",
    "cached_backward",
    "correlation_loss",
    "corsd_loss",
    "cutmix",
    "cwd_loss",
    "dist_loss",
    "kd_loss",
    "mixup",
    "mlkd_loss",
    "mlld_loss",
    "nkd_loss",
    "sp_loss",
    "stkd_loss",
    "supervised_contrastive_loss",
    "use_backend",
]
