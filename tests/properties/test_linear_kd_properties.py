"""linear_kd_loss, from live and from cached teachers, and corsd_loss, whatever they are given."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from checking import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from judging import MORE, Case, Draw, Family, check, on_backends
from strategies import fractions, labels, pairs, reductions, seeds, small, temperatures
from torch import Tensor

from kdkernels import Head, TopK, corsd_loss, linear_kd_loss
from kdkernels.ops.checks import compute_dtype
from kdkernels.ops.linear_kd.top_k import FLOOR

VOCABULARIES = st.sampled_from([1, 2, 3, 7, 31, 101])
ORDINARY = ("normal", "positive", "sparse", "repeated", "zero")  # products of the others are logits of no language


def heads(draw: Draw) -> tuple[list[Tensor], dict[str, Any]]:
    """Hidden states and weights of both networks, and what else the loss is given."""
    tokens, vocabulary, width = draw(st.sampled_from([0, 1, 2, 5, 13])), draw(VOCABULARIES), draw(small.filter(bool))
    hidden, of_teacher = draw(pairs((tokens, width), most=0, special=False, kinds=ORDINARY))
    weight, other = draw(pairs((vocabulary, width), most=0, special=False, kinds=ORDINARY))
    options: dict[str, Any] = {"temperature": draw(temperatures), "reduction": draw(reductions)}
    if draw(st.booleans()):
        options |= {"target": draw(labels(tokens, vocabulary)), "ce_weight": 0.5, "label_smoothing": 0.1}
    if draw(st.booleans()):
        mask = torch.rand(tokens, generator=torch.Generator().manual_seed(draw(seeds))) < 0.7
        options["mask"] = mask.to(DEVICE)
    return [hidden, weight, of_teacher, other], options | {"chunk": draw(st.sampled_from([None, 1, 3, 100]))}


def natural(tensors: list[Tensor], options: dict[str, Any]) -> float:
    """Of products of rows of the logits' gradient, which are as long as the weights and the hidden states."""
    length = sum(x.double().norm().item() for x in tensors)
    return 4 * max(options["temperature"], 1) * (1 + length) * (1 + length / options["temperature"])


def live(draw: Draw) -> Case:
    tensors, options = heads(draw)
    options["divergence"] = draw(st.sampled_from(["forward", "reverse", "jsd", "skew"]))
    softcap = draw(st.sampled_from([None, 30.0]))
    return Case(
        lambda h, w, *t: linear_kd_loss(Head(h, w, softcap=softcap), Head(*t), **options),
        tensors[:2],
        tensors[2:],
        natural=natural(tensors, options),
        rest_of=natural(tensors, options),
    )


def cached(draw: Draw) -> Case:
    """The teacher's largest log-probabilities, some of them padding."""
    (hidden, weight, *of_teacher), options = heads(draw)
    k = draw(st.integers(1, len(weight)))
    logits = of_teacher[0].double() @ of_teacher[1].double().T
    logprobs, ids = (logits / options["temperature"]).log_softmax(1).topk(k)
    if logprobs.numel() and k > 1 and draw(st.booleans()):
        logprobs[0, -1] = -torch.inf
    logprobs = logprobs.to(compute_dtype(hidden, weight))
    rest = draw(st.sampled_from(["bucket", "drop", "renormalise", "renormalise_both"]))

    def loss(h: Tensor, w: Tensor, logprobs: Tensor) -> Tensor:
        teacher = TopK(ids, logprobs, rest, options["temperature"])
        return linear_kd_loss(Head(h, w), teacher, **options)

    size = natural([hidden, weight, *of_teacher], options)
    # a bucket's mass is at least FLOOR, and the masses' sum as much over 1
    floor = FLOOR * options["temperature"] ** 2 / torch.finfo(logprobs.dtype).eps if rest == "bucket" else 0.0
    return Case(loss, [hidden, weight], [logprobs], natural=size, rest_of=size + floor)


def divergence(q: Tensor, p: Tensor, temperature: float) -> Tensor:
    return F.kl_div((q / temperature).log_softmax(-1), (p / temperature).softmax(-1), reduction="none").sum(-1)


def corsd(draw: Draw) -> Case:
    stages, batch, classes = draw(st.integers(1, 3)), draw(small), draw(st.sampled_from([1, 2, 7]))
    near, far = (draw(fractions((stages, batch))) for _ in range(2))
    # the formula below has no 0 log 0
    logits, others = draw(pairs((stages, batch, classes), most=2, special=False, kinds=["normal", "positive", "zero"]))
    near, far, others = (x.to(logits.dtype) for x in (near, far, others))
    a, b = (draw(labels(batch, classes, ignore=None)) for _ in range(2))
    detach, reduction = draw(st.booleans()), draw(reductions)

    def loss(near: Tensor, far: Tensor, logits: Tensor, others: Tensor) -> Tensor:
        return corsd_loss(near, far, logits, others, a, b, detach_deepest=detach, reduction=reduction)

    def oracle(near: Tensor, far: Tensor, logits: Tensor, others: Tensor) -> Tensor:
        rows = 0.01 * (near - far + 1).relu().sum(0)
        for x in (near, far):
            rows = rows + 0.01 * (x - (x[-1].detach() if detach else x[-1])).square().sum(0)
        for z, y, weights in ((logits, (a, a), (0.04, 0.16)), (others, (a, b), (0.01, 0.04))):
            for stage in range(stages):
                for label in y:
                    rows = rows + weights[0] / 2 * F.cross_entropy(z[stage], label, reduction="none")
                if stage < stages - 1:
                    deepest = z[-1].detach() if detach else z[-1]
                    rows = rows + weights[1] * divergence(z[stage], deepest, 3.0)
        if reduction == "none":
            return rows
        return rows.sum() / (max(batch, 1) if reduction == "mean" else 1)

    return Case(loss, [near, far, logits, others], oracle=oracle, natural=4.0 * stages * batch, own=1.0)


FAMILIES = {
    "live": Family(["softmax_kl"], live),
    "cached": Family(["softmax_kl"], cached),
    "corsd": Family(["softmax_kl"], corsd),
}


@on_backends(FAMILIES)
@MORE
@given(data=st.data())
def test_it_is_its_definition(family: Family, backend: str, data: st.DataObject) -> None:
    check(data.draw, family, backend)
