"""STKD: Similarity Transfer for Knowledge Distillation (Zhao et al. 2021, arXiv 2103.10047), as we read it.

Only the paper's abstract is certain; these equations are the reading that satisfies all of it:

    x~ = lam x + (1 - lam) x[pi];   y~ = lam onehot(y) + (1 - lam) onehot(y[pi])          mixup
    z_s = student(x~),  z_t = teacher(x~);   p = softmax(z),  q = softmax(z / T)
    L = ce_weight * mean_i CE(y~_i, p_s,i)  +  kd_weight * T^2 * mean_i KL(q_t,i || q_s,i)

With ``decouple=(w_target, w_non_target)`` the KL is split into the labelled classes and the others, whose mass is S:

    KL = TCKD + S_t NCKD   becomes   w_target TCKD + w_non_target NCKD    (DKD, arXiv 2203.08679, for one or two labels)

``divergence=`` and ``standardize=`` change the KL as they do in ``kd_loss``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kd_loss import check_divergence, flatten_positions
from .ops.checks import REDUCTIONS, check_number, check_positive, check_reduction, check_weight
from .ops.softmax_kl import Labels, Rows, Terms, softmax_kl


def stkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    target_mixed: Tensor | None = None,
    lam: Tensor | float | None = None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    decouple: tuple[float, float] | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    class_dim: int = -1,
    ignore_index: int = -100,
    scale_by_t2: bool = True,
    divergence: str = "forward",
    beta: float | None = None,
    standardize: bool = False,
) -> Tensor:
    """Mixed-label cross entropy plus T^2 KL to the teacher's probabilities on the same mixed images, in one pass.

    Args:
        student_logits, teacher_logits: logits of the mixed images, (N, C), (N, L, C), or any shape with the classes at
            ``class_dim`` ((N, C, d1, ...): 1). float16, bfloat16, float32 or float64, any strides. No gradient flows to
            the teacher.
        target: int64 labels in the logits' shape without the classes, or a dense floating-point target in the logits'
            shape, as other libraries' mixup makes.
        target_mixed, lam: the labels mixed in, and the weight of ``target``: a number, or a tensor of shape () or (N,).
            Give both or neither; ``mixup`` and ``cutmix`` make them. Without them: plain distillation with hard labels.
            A tensor's value outside [0, 1] makes its row's loss and gradient NaN.
        temperature: T > 0.
        ce_weight, kd_weight: weights of the two terms, each on its own scale.
        decouple: (w_target, w_non_target) weights the KL over the labelled classes and the KL among the others
            separately; (1, 8) is DKD's recipe for CIFAR-100. Needs integer labels. If both networks put a label's logit
            far above the others, fp32 rounding shows in the gradient: 2e-5 at a distance of 600.
        label_smoothing: e in [0, 1]; the cross entropy is with (1 - e) y + e / C, as in ``F.cross_entropy``.
        reduction: "mean" over the positions that count, "sum", or "none": one value per position, in the logits' shape
            without the classes. For (N, C) logits "batchmean" is the same as "mean".
        class_dim: where the classes are.
        ignore_index: positions with this label in ``target`` or ``target_mixed`` do not count and get no gradient.
        scale_by_t2: whether the KL is multiplied by T^2.
        divergence, beta: in the place of the KL, as in ``kd_loss``; decouple needs "forward".
        standardize: whether the terms with a teacher take standardised logits, as in ``kd_loss``; the cross entropy
            does not.

    Returns:
        float32 (float64 if an input is). An empty batch, or one where nothing counts, gives 0.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices, labels or options. Labels on an accelerator
            are not read back to be checked: a label out of range makes its row's loss and gradient NaN.

    Source: the abstract of arXiv 2103.10047; no accuracy is claimed for the paper.
    """
    _check_options(temperature, ce_weight, kd_weight, decouple, label_smoothing, ignore_index)
    shape = divergence, 0.5
    if divergence != "forward" or beta is not None:
        shape = _check_divergence(divergence, beta, decouple)
    student, teacher = flatten_positions(student_logits, teacher_logits, class_dim, "stkd_loss")
    if reduction not in REDUCTIONS:
        reduction = check_reduction(reduction, "stkd_loss", batchmean=student_logits.dim() == 2)
    labels = _flatten_labels(target, target_mixed, lam, ignore_index, label_smoothing, student_logits, class_dim)
    if decouple is not None and labels.dense:
        raise ValueError("stkd_loss: decouple needs integer labels, got a dense floating-point target")
    kd = kd_weight * temperature * temperature if scale_by_t2 else kd_weight
    terms = Terms(ce_weight, kd) if decouple is None else Terms(ce_weight, 0.0, kd * decouple[0], kd * decouple[1])
    rows = Rows(student, teacher, labels, terms, float(temperature), reduction, *shape, bool(standardize))
    loss = softmax_kl(rows)
    return loss.view(_positions(student_logits, class_dim)) if reduction == "none" else loss


def _check_options(
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    decouple: tuple[float, float] | None,
    label_smoothing: float,
    ignore_index: int,
) -> None:
    check_positive(temperature=temperature)
    check_weight(ce_weight=ce_weight, kd_weight=kd_weight, label_smoothing=label_smoothing)
    if label_smoothing > 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if decouple is None:
        return
    if not isinstance(decouple, (tuple, list)) or len(decouple) != 2:
        raise ValueError(f"decouple must be (w_target, w_non_target), got {decouple!r}")
    for weight in decouple:
        check_weight(decouple=weight)


def _check_divergence(divergence: str, beta: float | None, decouple: tuple[float, float] | None) -> tuple[str, float]:
    if decouple is not None and divergence != "forward":
        raise ValueError(f"decouple takes the forward KL apart: it excludes divergence={divergence!r}")
    return check_divergence(divergence, beta)


def _positions(logits: Tensor, class_dim: int) -> list[int]:
    shape = list(logits.shape)
    del shape[class_dim]
    return shape


def _flatten_labels(
    target: Tensor,
    mixed: Tensor | None,
    lam: Tensor | float | None,
    ignore_index: int,
    label_smoothing: float,
    logits: Tensor,
    class_dim: int,
) -> Labels:
    """The labels of the logits' positions, checked."""
    if (mixed is None) != (lam is None):
        raise ValueError("stkd_loss: target_mixed and lam go together: give both or neither")
    target = _flatten_target("target", target, logits, class_dim, dense_allowed=mixed is None)
    if mixed is not None and lam is not None:
        mixed = _flatten_target("target_mixed", mixed, logits, class_dim, dense_allowed=False)
        lam = _flatten_lam(lam, logits, target.shape[0])
    return Labels(target, mixed, lam, ignore_index, float(label_smoothing))  # type: ignore[arg-type]  # lam is a tensor or None by now


def _flatten_target(name: str, target: Tensor, logits: Tensor, class_dim: int, dense_allowed: bool) -> Tensor:
    if not isinstance(target, Tensor):
        raise TypeError(f"stkd_loss: {name} must be a torch.Tensor, got {type(target).__name__}")
    if target.device != logits.device:
        raise ValueError(f"stkd_loss: {name} is on {target.device} and the logits on {logits.device}; move one of them")
    if target.is_floating_point():
        if not dense_allowed:
            raise ValueError("stkd_loss: a dense target excludes target_mixed and lam, which belong to integer labels")
        if target.shape != logits.shape:
            raise ValueError(
                f"stkd_loss: a dense target must have the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(target.shape)}"
            )
        return target if target.dim() == 2 else target.movedim(class_dim, -1).reshape(-1, logits.shape[class_dim])
    if target.dtype != torch.int64:
        raise TypeError(f"stkd_loss: {name} must be int64 class indices, got {target.dtype}")
    shape = list(logits.shape[:1]) if logits.dim() == 2 else _positions(logits, class_dim)
    if shape != list(target.shape):
        raise ValueError(
            f"stkd_loss: {name} must have shape {tuple(shape)} (labels) or {tuple(logits.shape)} (dense), "
            f"got {tuple(target.shape)}"
        )
    return target if target.dim() == 1 else target.reshape(-1)


def _flatten_lam(lam: Tensor | float, logits: Tensor, positions: int) -> Tensor:
    if not isinstance(lam, Tensor):
        check_number("stkd_loss: lam (if not a tensor)", lam)
        if not 0 <= lam <= 1:
            raise ValueError(f"stkd_loss: lam must be in [0, 1], got {lam}")
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return torch.full((), lam, dtype=dtype, device=logits.device)
    if lam.device != logits.device:
        raise ValueError(f"stkd_loss: lam is on {lam.device} and the logits on {logits.device}; move one of them")
    if not lam.is_floating_point() or (lam.dim() and lam.shape != logits.shape[:1]):
        raise ValueError(
            f"stkd_loss: lam must be a number or a floating-point tensor of shape () or ({logits.shape[0]},), got "
            f"{lam.dtype} {tuple(lam.shape)}"
        )
    lam = torch.where((lam >= 0) & (lam <= 1), lam, torch.nan)  # reading values would stall an accelerator
    if lam.dim() == 0 or logits.dim() == 2:
        return lam
    return lam[:, None].expand(-1, positions // max(len(lam), 1)).reshape(-1)


class STKDLoss(nn.Module):
    """``stkd_loss`` with its options as a module: ``STKDLoss()(student_logits, teacher_logits, *labels)``."""

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        decouple: tuple[float, float] | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        class_dim: int = -1,
        ignore_index: int = -100,
        scale_by_t2: bool = True,
        divergence: str = "forward",
        beta: float | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        _check_options(temperature, ce_weight, kd_weight, decouple, label_smoothing, ignore_index)
        _check_divergence(divergence, beta, decouple)
        check_reduction(reduction, "STKDLoss", batchmean=True)
        self.temperature, self.ce_weight, self.kd_weight = temperature, ce_weight, kd_weight
        self.decouple, self.label_smoothing, self.reduction = decouple, label_smoothing, reduction
        self.class_dim, self.ignore_index, self.scale_by_t2 = class_dim, ignore_index, scale_by_t2
        self.divergence, self.beta, self.standardize = divergence, beta, standardize

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        target_mixed: Tensor | None = None,
        lam: Tensor | float | None = None,
    ) -> Tensor:
        return stkd_loss(
            student_logits,
            teacher_logits,
            target,
            target_mixed,
            lam,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            decouple=self.decouple,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            class_dim=self.class_dim,
            ignore_index=self.ignore_index,
            scale_by_t2=self.scale_by_t2,
            divergence=self.divergence,
            beta=self.beta,
            standardize=self.standardize,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, ce_weight={self.ce_weight}, kd_weight={self.kd_weight}, "
            f"decouple={self.decouple}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}, "
            f"class_dim={self.class_dim}, ignore_index={self.ignore_index}, scale_by_t2={self.scale_by_t2}, "
            f"divergence={self.divergence!r}, beta={self.beta}, standardize={self.standardize}"
        )
