"""CORSD: Class-Oriented Relational Self Distillation (Yu et al., ICASSP 2023, arXiv 2305.00918).

A network teaches its own shallow stages. Per stage l = 1..L (L the deepest) and triplet (anchor, positive, negative
image), a relation network gives r in (0, 1), small for images of one class, and class logits q; r+, q+ of the pair
(anchor, positive) and r-, q- of (anchor, negative); y and y' are the labels of anchor and negative. Means are over the
triplets.

    triplet      sum_l        0.01 mean max(0, r+_l - r-_l + 1)
    relation     sum_{l < L}  0.01 [mean (r+_l - r+_L)^2 + mean (r-_l - r-_L)^2]
    classes +    sum_l        0.04 CE(q+_l, y)             + 0.16 KL_T(q+_L -> q+_l)
    classes -    sum_l        0.01 CE(q-_l, (y + y') / 2)  + 0.04 KL_T(q-_L -> q-_l)
    KL_T(a -> b) = mean KL(softmax(a / T) || softmax(b / T)), T = 3, no T^2;  0 for l = L

The weights and terms are those of the paper and the authors' code (muzhou-yu/CORSD). That code does not run and passes
raw logits to its KL, so KL_T and the logit relation are its evident intent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .corsd_networks import LogitRelation, RelationNetwork
from .ops.checks import (
    FLOATING,
    check_labels,
    check_positive,
    check_reduction,
    check_tensor,
    check_weight,
    compute_dtype,
)
from .ops.softmax_kl import NO_LABEL, Labels, Rows, Terms, softmax_kl


def corsd_loss(
    relations_pos: Tensor,
    relations_neg: Tensor,
    logits_pos: Tensor,
    logits_neg: Tensor,
    target: Tensor,
    target_neg: Tensor,
    *,
    triplet_weight: float = 0.01,
    relation_weight: float = 0.01,
    ce_pos_weight: float = 0.04,
    kl_pos_weight: float = 0.16,
    ce_neg_weight: float = 0.01,
    kl_neg_weight: float = 0.04,
    temperature: float = 3.0,
    margin: float = 1.0,
    detach_deepest: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The triplet, relation and class terms of all stages, without the task's cross entropy.

    Args:
        relations_pos, relations_neg: (L, B) relation scores, deepest stage last. float16, bfloat16, float32 or float64.
        logits_pos, logits_neg: (L, B, K) class logits of the relation networks.
        target, target_neg: (B,) int64 labels of the anchors (and positives) and of the negatives.
        triplet_weight, ..., kl_neg_weight: the weights of the six terms, the same for every stage; positives are pairs
            of one class, negatives of two.
        temperature: T > 0 of the KL terms.
        margin: of the triplet term. At 1 the hinge never clips, as scores lie in (0, 1): its gradient is constant.
        detach_deepest: the deepest stage is a constant in the relation and KL terms: knowledge flows from deep to
            shallow, as the paper says. False lets gradients reach it, as in the published code.
        reduction: over the triplets: "mean", "sum" or "none" (B,).

    Returns:
        float32 (float64 if an input is). B = 0 gives 0.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices, labels or options, with what was given. Labels on an
            accelerator are not read back to be checked: a label out of range makes the loss NaN.

    Source: arXiv 2305.00918; the authors' muzhou-yu/CORSD.
    """
    _check(relations_pos, relations_neg, logits_pos, logits_neg, target, target_neg)
    _check_options(
        temperature,
        margin,
        triplet_weight=triplet_weight,
        relation_weight=relation_weight,
        ce_pos_weight=ce_pos_weight,
        kl_pos_weight=kl_pos_weight,
        ce_neg_weight=ce_neg_weight,
        kl_neg_weight=kl_neg_weight,
    )
    reduction = check_reduction(reduction, "corsd_loss", batchmean=True)
    dtype = compute_dtype(relations_pos, relations_neg, logits_pos, logits_neg)
    near, far = relations_pos.to(dtype), relations_neg.to(dtype)
    triplets = triplet_weight * (near - far + margin).relu().sum(0)
    for r in (near, far):
        deepest = r[-1].detach() if detach_deepest else r[-1]
        triplets = triplets + relation_weight * (r[:-1] - deepest).square().sum(0)
    positive, negative = Terms(ce_pos_weight, kl_pos_weight), Terms(ce_neg_weight, kl_neg_weight)
    loss = _reduce(triplets, reduction)
    loss = loss + _classes(logits_pos, target, None, temperature, positive, detach_deepest, reduction)
    return loss + _classes(logits_neg, target, target_neg, temperature, negative, detach_deepest, reduction)


def _reduce(triplets: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return triplets
    return triplets.sum() / (max(triplets.shape[0], 1) if reduction == "mean" else 1)


def _classes(
    logits: Tensor,
    target: Tensor,
    other: Tensor | None,
    temperature: float,
    terms: Terms,
    detach_deepest: bool,
    reduction: str,
) -> Tensor:
    """Cross entropy of all stages and KL of the shallow ones to the deepest, whose KL to itself is left out."""
    if not detach_deepest:  # two ops give each row a gradient, and the sum is rounded, not they
        logits = logits.to(compute_dtype(logits))
    shallow, deepest = logits[:-1], logits[-1]
    stages, batch, classes = shallow.shape
    half = None if other is None else torch.full((), 0.5, device=logits.device)

    def ce_and_kl(rows: Tensor, teacher: Tensor, repeats: int, terms: Terms) -> Tensor:
        mixed = None if other is None else other.repeat(repeats)
        labels = Labels(target.repeat(repeats), mixed, half, ignore_index=NO_LABEL)
        loss = softmax_kl(Rows(rows, teacher.detach(), labels, terms, float(temperature), reduction))
        if reduction == "none":
            return loss.view(repeats, batch).sum(0)
        # a mean over all stages' rows, times their number, is the sum of the stages' means
        return loss * repeats if reduction == "mean" else loss

    loss = ce_and_kl(deepest, deepest, 1, Terms(terms.ce, 0.0))
    if stages == 0:
        return loss
    rows, teacher = shallow.reshape(-1, classes), deepest.expand_as(shallow).reshape(-1, classes)
    loss = loss + ce_and_kl(rows, teacher, stages, terms if detach_deepest else Terms(terms.ce, 0.0))
    if not detach_deepest:  # the op's teacher is a constant, and here it is not
        dtype = compute_dtype(logits)
        log_q, log_p = ((x.to(dtype) / temperature).log_softmax(1) for x in (rows, teacher))
        kl = (log_p.exp() * (log_p - log_q)).sum(1).view(stages, batch).sum(0)
        loss = loss + terms.kl * _reduce(kl, reduction)
    return loss


def _check(near: Tensor, far: Tensor, logits: Tensor, logits_neg: Tensor, target: Tensor, target_neg: Tensor) -> None:
    for x in (near, far, logits, logits_neg):
        check_tensor("corsd_loss: relations and logits", x)
        if x.device != near.device:
            raise ValueError(f"corsd_loss: tensors are on {near.device} and {x.device}; move one of them")
        if x.dtype not in FLOATING:
            raise TypeError(f"corsd_loss: relations and logits must be floating-point tensors, got {x.dtype}")
    shapes = [tuple(x.shape) for x in (near, far, logits, logits_neg)]
    if near.dim() != 2 or not near.shape[0] or logits.dim() != 3 or logits.shape[:2] != near.shape:
        raise ValueError(f"corsd_loss: relations must be (L, B) and logits (L, B, K), got {shapes}")
    if near.shape != far.shape or logits.shape != logits_neg.shape:
        raise ValueError(f"corsd_loss: positives and negatives must have the same shapes, got {shapes}")
    for name, y in (("target", target), ("target_neg", target_neg)):
        check_labels(f"corsd_loss: {name}", y, near.shape[1:], near.device)
        if y.device.type != "cpu" or torch.compiler.is_compiling() or not y.numel():
            continue  # values are read only where nothing has to wait for them
        if not 0 <= int(y.min()) <= int(y.max()) < logits.shape[2]:
            raise ValueError(
                f"corsd_loss: {name} must be in 0..{logits.shape[2] - 1}, no label is ignored; got {y.tolist()}"
            )


def _check_options(temperature: float, margin: float, **weights: float) -> None:
    check_positive(temperature=temperature)
    check_weight(margin=margin)
    check_weight("corsd_loss", **weights)


class CORSDLoss(nn.Module):
    """``corsd_loss`` with its relation networks: ``CORSDLoss((64, 128, 256, 512), 100)(features, target, target_neg)``.

    Args:
        channels: the stages' channels, shallow to deep. The trunk of stage l has one SepConv block per deeper stage
            and ends with twice the deepest's channels: 3, 2, 1, 0 blocks for four stages.
        num_classes: K.
        logit_relation_weight: the weight of the optional logit relation (0.01 in the paper), 0 for none.
        The others: as in ``corsd_loss``. With reduction "none" there is no logit relation.

    The negatives go through the relation networks first, so BatchNorm sees them first. The parameters train with the
    network and are dropped afterwards; in data-parallel training wrap this module like the network. The cross entropy
    over all 3 B images, weight 1, is left to the trainer.

    Source: arXiv 2305.00918; the authors' muzhou-yu/CORSD.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        *,
        triplet_weight: float = 0.01,
        relation_weight: float = 0.01,
        ce_pos_weight: float = 0.04,
        kl_pos_weight: float = 0.16,
        ce_neg_weight: float = 0.01,
        kl_neg_weight: float = 0.04,
        logit_relation_weight: float = 0.0,
        temperature: float = 3.0,
        margin: float = 1.0,
        detach_deepest: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if len(channels) < 2 or min(channels) < 1:
            raise ValueError(f"CORSDLoss: channels must be two or more positive numbers, got {tuple(channels)}")
        if num_classes < 2:
            raise ValueError(f"CORSDLoss: num_classes must be 2 or more, got {num_classes}")
        check_weight(logit_relation_weight=logit_relation_weight)
        weights = {
            "triplet_weight": triplet_weight,
            "relation_weight": relation_weight,
            "ce_pos_weight": ce_pos_weight,
            "kl_pos_weight": kl_pos_weight,
            "ce_neg_weight": ce_neg_weight,
            "kl_neg_weight": kl_neg_weight,
        }
        _check_options(temperature, margin, **weights)
        reduction = check_reduction(reduction, "CORSDLoss", per_sample=not logit_relation_weight, batchmean=True)
        self.channels, self.num_classes, self.logit_relation_weight = (
            tuple(channels),
            num_classes,
            logit_relation_weight,
        )
        self.options: dict[str, Any] = {
            **weights,
            "temperature": temperature,
            "margin": margin,
            "detach_deepest": detach_deepest,
            "reduction": reduction,
        }
        widths, last = [2 * c for c in channels], len(channels) - 1
        self.relations = nn.ModuleList(
            RelationNetwork(widths[i:], channels[0] * (4 if i == last else 2), num_classes) for i in range(last + 1)
        )
        self.logit_relation = LogitRelation(num_classes) if logit_relation_weight else None

    def forward(
        self, features: Sequence[Tensor], target: Tensor, target_neg: Tensor, logits: Tensor | None = None
    ) -> Tensor:
        """The loss of one batch of triplets.

        Args:
            features: one (3 B, C_l, H_l, W_l) tensor per stage; rows 3i, 3i+1, 3i+2 are anchor, positive and negative
                i, as ``kdkernels.training.triplets`` makes them.
            target, target_neg: (B,) int64.
            logits: (3 B, K), the network's own; only the logit relation needs them.
        """
        check_tensor("CORSDLoss: target", target)
        batch = target.shape[0]
        shapes = [tuple(f.shape) for f in features]
        if len(shapes) != len(self.channels) or any(
            len(s) != 4 or s[:2] != (3 * batch, c) for s, c in zip(shapes, self.channels, strict=True)
        ):
            raise ValueError(
                f"CORSDLoss: features must be (3 B, C, H, W) with B = {batch} targets and channels {self.channels}, "
                f"got {shapes}"
            )
        scores: dict[int, tuple[Tensor, Tensor]] = {}
        for other in (2, 1):  # negatives first
            pairs = [net(f[0::3], f[other::3]) for net, f in zip(self.relations, features, strict=True)]
            relations, classes = zip(*pairs, strict=True)
            scores[other] = torch.stack(relations), torch.stack(classes)
        (near, classes_pos), (far, classes_neg) = scores[1], scores[2]
        loss = corsd_loss(near, far, classes_pos, classes_neg, target, target_neg, **self.options)
        if self.logit_relation is None:
            return loss
        if logits is None or logits.shape != (3 * batch, self.num_classes):
            given = None if logits is None else tuple(logits.shape)
            raise ValueError(
                f"CORSDLoss: the logit relation needs logits ({3 * batch}, {self.num_classes}), got {given}"
            )
        labels = torch.stack([target, target, target_neg], 1).flatten()
        relation = self.logit_relation(logits, labels)
        if self.options["reduction"] == "sum":
            relation = relation * batch
        return loss + self.logit_relation_weight * relation
