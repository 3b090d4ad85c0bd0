"""STKD: Similarity Transfer for Knowledge Distillation (Zhao et al. 2021, arXiv 2103.10047), as we read it.

Only the paper's abstract is certain; these equations are the reading that satisfies all of it:

    x~ = lam x + (1 - lam) x[pi];   y~ = lam onehot(y) + (1 - lam) onehot(y[pi])          mixup
    z_s = student(x~),  z_t = teacher(x~);   p = softmax(z),  q = softmax(z / T)
    L = ce_weight * mean_i CE(y~_i, p_s,i)  +  kd_weight * T^2 * mean_i KL(q_t,i || q_s,i)

and with ``decouple=(w_target, w_other)`` the KL is split into the labelled classes and the rest, whose mass is S:

    KL = TCKD + S_t NCKD   becomes   w_target TCKD + w_other NCKD        (DKD, arXiv 2203.08679, for one or two labels)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kd_loss import flatten_positions
from .ops.checks import REDUCTIONS, check_choice, check_number, check_positive, check_tensor, check_weight
from .ops.softmax_kl import softmax_kl


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
    reduction: str = "batchmean",
    ignore_index: int = -100,
) -> Tensor:
    """Mixed-label cross entropy plus T^2 KL to the teacher's probabilities on the same mixed images, in one pass.

    Args:
        student_logits, teacher_logits: (N, C) or (N, L, C) logits of the mixed images. float16, bfloat16, float32
            or float64, any strides. No gradient flows to the teacher.
        target: int64 labels, (N,) or (N, L), or a dense floating-point target in the logits' shape, as other libraries'
            mixup makes.
        target_mixed, lam: the labels mixed in, and the weight of ``target``: a number, a tensor of shape () or (N,).
            Both or neither; ``mixup`` and ``cutmix`` make them. Without them: plain distillation with hard labels.
        temperature: T > 0.
        ce_weight, kd_weight: weights of the two terms, each on its own scale.
        decouple: (w_target, w_other) weights the KL over the labelled classes and that among the others apart;
            (1, 8) is DKD's recipe for CIFAR-100. Needs integer labels. In fp32, where both networks put a label's logit
            far above the others, their rounding beside it shows in the gradient: 2e-5 at a distance of 600.
        reduction: "batchmean" (mean over the positions that count), "sum", "none" (one value per position).
        ignore_index: positions with this label in ``target`` or ``target_mixed`` do not count and get no gradient.

    Returns:
        float32 (float64 if an input is). An empty batch, or one where nothing counts, gives 0.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices, labels or options that cannot be meant. Labels on an accelerator
            are not read back to be checked: one out of range makes its row's loss and gradient NaN.

    Source: the abstract of arXiv 2103.10047; no accuracy is claimed for the paper.
    """
    _check_options(temperature, ce_weight, kd_weight, decouple, reduction, ignore_index)
    student, teacher = flatten_positions(student_logits, teacher_logits, -1, "stkd_loss")
    if student_logits.dim() > 3:
        raise ValueError(f"stkd_loss: logits must be (N, C) or (N, L, C), got {tuple(student_logits.shape)}")
    positions = student_logits.shape[:-1]
    target = _flatten_target("target", target, student_logits)
    if target_mixed is not None:
        target_mixed = _flatten_target("target_mixed", target_mixed, student_logits)
    if (target_mixed is None) != (lam is None):
        raise ValueError("stkd_loss: target_mixed and lam go together: give both or neither")
    if lam is not None:
        lam = _flatten_lam(lam, student_logits)

    kd_weight = kd_weight * temperature**2
    kl_weight, target_weight, other_weight = kd_weight, 0.0, 0.0
    if decouple is not None:
        kl_weight, target_weight, other_weight = 0.0, kd_weight * decouple[0], kd_weight * decouple[1]
    loss = softmax_kl(
        student,
        teacher,
        target,
        target_mixed,
        lam,
        temperature=temperature,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        target_weight=target_weight,
        other_weight=other_weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return loss.view(positions) if reduction == "none" else loss


def _check_options(
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    decouple: tuple[float, float] | None,
    reduction: str,
    ignore_index: int,
) -> None:
    check_choice("reduction", reduction, REDUCTIONS)
    check_positive("temperature", temperature)
    check_weight("ce_weight", ce_weight)
    check_weight("kd_weight", kd_weight)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if decouple is None:
        return
    if not isinstance(decouple, (tuple, list)) or len(decouple) != 2:
        raise ValueError(f"decouple must be (w_target, w_other), got {decouple!r}")
    for weight in decouple:
        check_weight("decouple", weight)


def _flatten_target(name: str, target: Tensor, logits: Tensor) -> Tensor:
    check_tensor(f"stkd_loss: {name}", target)
    expected = logits.shape if target.is_floating_point() else logits.shape[:-1]
    if target.shape != expected:
        raise ValueError(
            f"stkd_loss: {name} must have shape {tuple(logits.shape[:-1])} (labels) or {tuple(logits.shape)} (dense), "
            f"got {tuple(target.shape)}"
        )
    if logits.dim() == 2:
        return target
    return target.reshape(-1, logits.shape[-1]) if target.is_floating_point() else target.reshape(-1)


def _flatten_lam(lam: Tensor | float, logits: Tensor) -> Tensor:
    if not isinstance(lam, Tensor):
        check_number("stkd_loss: lam (if it is no tensor)", lam)
        if not 0 <= lam <= 1:
            raise ValueError(f"stkd_loss: lam must be in [0, 1], got {lam}")
        return torch.full(
            (), lam, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32, device=logits.device
        )
    if lam.dim() == 0:
        return lam
    if lam.shape != logits.shape[:1]:
        raise ValueError(
            f"stkd_loss: lam must be a number or have shape () or ({logits.shape[0]},), got {tuple(lam.shape)}"
        )
    return lam if logits.dim() == 2 else lam[:, None].expand(logits.shape[:2]).reshape(-1)


class STKDLoss(nn.Module):
    """``stkd_loss`` with its options as a module: ``STKDLoss()(student_logits, teacher_logits, *labels)``."""

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        decouple: tuple[float, float] | None = None,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        _check_options(temperature, ce_weight, kd_weight, decouple, reduction, ignore_index)
        self.temperature, self.ce_weight, self.kd_weight = temperature, ce_weight, kd_weight
        self.decouple, self.reduction, self.ignore_index = decouple, reduction, ignore_index

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
            reduction=self.reduction,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, ce_weight={self.ce_weight}, kd_weight={self.kd_weight}, "
            f"decouple={self.decouple}"
        )


Mixed = tuple[Tensor, Tensor, Tensor, Tensor]


def mixup(
    images: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
    per_sample: bool = False,
) -> Mixed:
    """lam x + (1 - lam) x[pi] with lam ~ Beta(alpha, alpha), pi a permutation of the batch (arXiv 1710.09412).

    Args:
        images: (B, ...) floating-point.
        target: (B,) labels.
        alpha: 0.01 or more; 1 makes lam uniform.
        generator: a CPU generator for reproducible draws.
        per_sample: one lam per image instead of one per batch.

    Returns:
        images, target, target[pi], lam: what ``stkd_loss`` takes. lam is a float32 tensor, () or (B,).
    """
    lam, order = _draw(images, target, alpha, generator, per_sample)
    weight = _per_image(lam, images).to(images.dtype)
    return images * weight + images[order] * (1 - weight), target, target[order], lam


def cutmix(
    images: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
    per_sample: bool = False,
) -> Mixed:
    """A box of x[pi] pasted into x; lam is the share of x that is left (arXiv 1905.04899). Arguments as ``mixup``'s.

    The box covers about 1 - lam of the image, lam ~ Beta(alpha, alpha), around a uniform centre, cut off at the border;
    the lam that is returned counts its pixels. images: (B, C, H, W).
    """
    check_tensor("images", images)
    if images.dim() != 4:
        raise ValueError(f"cutmix: images must be (B, C, H, W), got {tuple(images.shape)}")
    lam, order = _draw(images, target, alpha, generator, per_sample)
    centre = torch.rand(2, *lam.shape, generator=generator).to(images.device)
    side = (1 - lam).sqrt() / 2
    inside = []
    for c, n in zip(centre, images.shape[2:], strict=True):
        low, high = ((c - side) * n).round(), ((c + side) * n).round()
        pixel = torch.arange(n, device=images.device)
        inside.append((pixel >= low[..., None]) & (pixel < high[..., None]))
    box = inside[0][..., :, None] & inside[1][..., None, :]
    mask = box[:, None] if per_sample else box
    return torch.where(mask, images[order], images), target, target[order], 1 - box.float().mean((-2, -1))


def _draw(
    images: Tensor, target: Tensor, alpha: float, generator: torch.Generator | None, per_sample: bool
) -> tuple[Tensor, Tensor]:
    """lam and the permutation, drawn on the CPU and moved."""
    check_positive("alpha", alpha)
    if alpha < 0.01:  # both of Beta's gamma draws would underflow now and then, and lam be 0.5
        raise ValueError(f"alpha must be 0.01 or more, got {alpha}")
    check_tensor("images", images)
    check_tensor("target", target)
    if not images.is_floating_point():
        raise TypeError(f"images must be floating-point to be mixed, got {images.dtype}")
    if images.shape[0] != target.shape[0]:
        raise ValueError(f"images and target differ in B: {tuple(images.shape)} and {tuple(target.shape)}")
    concentration = torch.full((images.shape[0] if per_sample else 1, 2), alpha, dtype=torch.float64)
    lam = torch._sample_dirichlet(concentration, generator)[:, 0].float()  # Beta(a, a), and it takes a generator
    order = torch.randperm(images.shape[0], generator=generator)
    lam = lam if per_sample else lam[0]
    return lam.to(images.device, non_blocking=True), order.to(images.device, non_blocking=True)


def _per_image(lam: Tensor, images: Tensor) -> Tensor:
    return lam.view(-1, *(1,) * (images.dim() - 1)) if lam.dim() else lam
