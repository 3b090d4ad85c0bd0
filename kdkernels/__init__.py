"""kdkernels: exact, fast knowledge-distillation losses, one function call on two tensors."""

from .accumulation import cached_backward
from .alignment_loss import AlignmentLoss, alignment_loss
from .amd_loss import AMDLoss, amd_loss
from .at_loss import ATLoss, at_loss
from .correlation_loss import CorrelationLoss, correlation_loss
from .corsd_loss import CORSDLoss, corsd_loss
from .feature_maps import channel_gram, energy
from .fsp_loss import FSPLoss, fsp_loss
from .ft_loss import FTLoss, ft_loss
from .ickd_loss import ICKDLoss, ickd_loss
from .kd_loss import KDLoss, kd_loss
from .mixing import cutmix, mixup
from .mlkd_loss import MLKDLoss, mlkd_loss
from .nst_loss import NSTLoss, nst_loss
from .ops.backend import BackendError, use_backend
from .sp_loss import SPLoss, sp_loss
from .stkd_loss import STKDLoss, stkd_loss
from .supervised_contrastive_loss import SupervisedContrastiveLoss, supervised_contrastive_loss

__version__ = "0.1.0"

__all__ = [
    "AMDLoss",
    "ATLoss",
    "AlignmentLoss",
    "BackendError",
    "CORSDLoss",
    "CorrelationLoss",
    "FSPLoss",
    "FTLoss",
    "ICKDLoss",
    "KDLoss",
    "MLKDLoss",
    "NSTLoss",
    "SPLoss",
    "STKDLoss",
    "SupervisedContrastiveLoss",
    "__version__",
    "alignment_loss",
    "amd_loss",
    "at_loss",
    "cached_backward",
    "channel_gram",
    "correlation_loss",
    "corsd_loss",
    "cutmix",
    "energy",
    "fsp_loss",
    "ft_loss",
    "ickd_loss",
    "kd_loss",
    "mixup",
    "mlkd_loss",
    "nst_loss",
    "sp_loss",
    "stkd_loss",
    "supervised_contrastive_loss",
    "use_backend",
]
