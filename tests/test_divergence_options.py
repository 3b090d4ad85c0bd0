"""divergence=, beta=, standardize= and scale_by_t2= of kd_loss and stkd_loss: what they mean, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kdkernels import KDLoss, STKDLoss, kd_loss, stkd_loss
from kdkernels.compat import mdistiller

T = 3.0
STUDENT, TEACHER = torch.randn(7, 11, dtype=torch.float64), torch.randn(7, 11, dtype=torch.float64)
TARGET = torch.arange(7)
P, Q = ((z / T).softmax(1) for z in (TEACHER, STUDENT))


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum(1).mean()


FORMULAS = {
    ("forward", None): kl(P, Q),
    ("reverse", None): kl(Q, P),
    ("jsd", None): 0.5 * kl(P, 0.5 * P + 0.5 * Q) + 0.5 * kl(Q, 0.5 * P + 0.5 * Q),
    ("jsd", 0.2): 0.2 * kl(P, 0.2 * P + 0.8 * Q) + 0.8 * kl(Q, 0.2 * P + 0.8 * Q),
    ("skew", None): kl(P, 0.1 * P + 0.9 * Q),
    ("skew", 0): kl(P, Q),
    ("skew_reverse", None): kl(Q, 0.9 * P + 0.1 * Q),
    ("skew_reverse", 0.0): kl(Q, P),
}


@pytest.mark.parametrize(("divergence", "beta"), list(FORMULAS))
def test_the_divergences_are_their_formulas(divergence: str, beta: float | None) -> None:
    expected = FORMULAS[divergence, beta]
    options = {"temperature": T, "divergence": divergence, "beta": beta}
    close = torch.testing.assert_close
    close(kd_loss(STUDENT, TEACHER, **options), T**2 * expected)
    close(KDLoss(scale_by_t2=False, **options)(STUDENT, TEACHER), expected)
    ce = F.cross_entropy(STUDENT, TARGET)
    weights = {"ce_weight": 0.3, "kd_weight": 0.7}
    close(stkd_loss(STUDENT, TEACHER, TARGET, **weights, **options), 0.3 * ce + 0.7 * T**2 * expected)
    module = STKDLoss(scale_by_t2=False, **weights, **options)
    close(module(STUDENT, TEACHER, TARGET), 0.3 * ce + 0.7 * expected)
    assert f"divergence={divergence!r}" in repr(module)


def test_standardised_logits_are_those_of_the_authors() -> None:
    z = [(x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True)) for x in (STUDENT, TEACHER)]
    close = torch.testing.assert_close
    close(kd_loss(STUDENT, TEACHER, temperature=T, standardize=True), kd_loss(*z, temperature=T))
    ce = F.cross_entropy(STUDENT, TARGET)
    decoupled = stkd_loss(*z, TARGET, ce_weight=0, decouple=(1, 8), temperature=T)
    both = stkd_loss(STUDENT, TEACHER, TARGET, ce_weight=1, decouple=(1, 8), temperature=T, standardize=True)
    close(both, ce + decoupled)
    with pytest.raises(ValueError, match=r"logit_stand needs \(N, C\) logits, got \(7, 11, 2\)"):
        mdistiller.kd_loss(STUDENT[..., None].expand(-1, -1, 2), TEACHER[..., None].expand(-1, -1, 2), T, True)


@pytest.mark.parametrize("loss", [KDLoss, STKDLoss, kd_loss, stkd_loss])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of 'forward', 'reverse', 'jsd'.*got 'kl'"),
        ({"beta": 0.5}, "divergence='forward' has no beta, got 0.5"),
        ({"divergence": "reverse", "beta": 0.5}, "divergence='reverse' has no beta"),
        ({"divergence": "jsd", "beta": 0}, r"is 0 for beta=0; KL\(teacher \|\| student\).* is 'forward'"),
        ({"divergence": "jsd", "beta": 1.0}, r"is 0 for beta=1.0; KL\(student \|\| teacher\).* is 'reverse'"),
        ({"divergence": "jsd", "beta": 1.5}, r"beta must be in \(0, 1\) for divergence='jsd', got 1.5"),
        ({"divergence": "skew", "beta": 1}, r"beta must be in \[0, 1\) for divergence='skew', got 1"),
        ({"divergence": "skew_reverse", "beta": float("nan")}, r"beta must be in \[0, 1\)"),
    ],
)
def test_what_is_refused(loss: Any, options: dict[str, Any], message: str) -> None:
    given = () if isinstance(loss, type) else (STUDENT, TEACHER, TARGET)[: 2 + (loss is stkd_loss)]
    with pytest.raises(ValueError, match=message):
        loss(*given, **options)
    with pytest.raises(TypeError, match="beta must be a number"):
        loss(*given, divergence="jsd", beta="0.5")


def test_decoupled_terms_are_of_the_forward_kl() -> None:
    with pytest.raises(ValueError, match="decouple takes the forward KL apart: it excludes divergence='jsd'"):
        stkd_loss(STUDENT, TEACHER, TARGET, decouple=(1.0, 8.0), divergence="jsd")
    with pytest.raises(ValueError, match="decouple"):
        STKDLoss(decouple=(1.0, 8.0), divergence="reverse")
