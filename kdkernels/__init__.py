"""kdkernels: exact, fast knowledge-distillation losses, one function call on two tensors."""

from .accumulation import cached_backward
from .alignment_loss import AlignmentLoss, alignment_loss
from .amd_loss import AMDLoss, amd_loss
from .at_loss import ATLoss, at_loss
from .cc_loss import CCLoss, cc_loss, neighbour_correlation_loss
from .correlation_loss import CorrelationLoss, correlation_loss
from .corsd_loss import CORSDLoss, corsd_loss
from .cwd_loss import CWDLoss, cwd_loss
from .dist_loss import DISTLoss, dist_loss
from .feature_maps import channel_gram, energy
from .fsp_loss import FSPLoss, fsp_loss
from .ft_loss import FTLoss, ft_loss
from .gram import cosine_similarity, gram
from .heads import Head, TopK
from .ickd_loss import ICKDLoss, ickd_loss
from .irg_loss import IRGLoss, irg_loss
from .kd_loss import KDLoss, kd_loss
from .linear_kd_loss import LinearKDLoss, linear_kd_loss
from .mixing import cutmix, mixup
from .mlkd_loss import MLKDLoss, mlkd_loss
from .mlld_loss import MLLDLoss, mlld_loss
from .nkd_loss import NKDLoss, nkd_loss
from .nst_loss import NSTLoss, nst_loss
from .ops.backend import BackendError, use_backend
from .pkt_loss import PKTLoss, pkt_loss
from .rkd_loss import RKDLoss, rkd_loss
from .sp_loss import SPLoss, sp_loss
from .stkd_loss import STKDLoss, stkd_loss
from .supervised_contrastive_loss import SupervisedContrastiveLoss, supervised_contrastive_loss

__version__ = "0.1.0"

__all__ = [
    "AMDLoss",
    "ATLoss",
    "AlignmentLoss",
    "BackendError",
    "CCLoss",
    "CORSDLoss",
    "CWDLoss",
    "CorrelationLoss",
    "DISTLoss",
    "FSPLoss",
    "FTLoss",
    "Head",
    "ICKDLoss",
    "IRGLoss",
    "KDLoss",
    "LinearKDLoss",
    "MLKDLoss",
    "MLLDLoss",
    "NKDLoss",
    "NSTLoss",
    "PKTLoss",
    "RKDLoss",
    "SPLoss",
    "STKDLoss",
    "SupervisedContrastiveLoss",
    "TopK",
    "__version__",
    "alignment_loss",
    "amd_loss",
    "at_loss",
    "cached_backward",
    "cc_loss",
    "channel_gram",
    "correlation_loss",
    "corsd_loss",
    "cosine_similarity",
    "cutmix",
    "cwd_loss",
    "dist_loss",
    "energy",
    "fsp_loss",
    "ft_loss",
    "gram",
    "ickd_loss",
    "irg_loss",
    "kd_loss",
    "linear_kd_loss",
    "mixup",
    "mlkd_loss",
    "mlld_loss",
    "neighbour_correlation_loss",
    "nkd_loss",
    "nst_loss",
    "pkt_loss",
    "rkd_loss",
    "sp_loss",
    "stkd_loss",
    "supervised_contrastive_loss",
    "use_backend",
]
