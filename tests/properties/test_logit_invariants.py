"""What losses of logits do not depend on, where they are 0, and what becomes of them in the limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import DEVICE
from hypothesis import assume, given
from hypothesis import strategies as st
from invariance import Pair, gradient, no_more_than, of_numbers, permuted, shapes
from strategies import labels, seeds, temperatures
from torch import Tensor

from kdkernels import cwd_loss, dist_loss, kd_loss, mlld_loss, nkd_loss, stkd_loss

pytestmark = pytest.mark.usefixtures("backend")
DIVERGENCES = ["forward", "reverse", "jsd", "skew", "skew_reverse"]


def mlld(s: Tensor, t: Tensor) -> Tensor:
    return mlld_loss(s, t, temperatures=[1.0, 4.0], strong_temperatures=[])


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kd": lambda s, t: kd_loss(s, t, reduction="sum"),
    "jsd": lambda s, t: kd_loss(s, t, reduction="sum", divergence="jsd"),
    "standardised": lambda s, t: kd_loss(s, t, reduction="sum", standardize=True),
    "dist": dist_loss,
    "mlld": mlld,
}


@pytest.mark.parametrize("name", list(LOSSES))
@given(pair=shapes().flatmap(of_numbers), order=seeds)
def test_the_order_of_rows_and_of_classes_does_not_matter(name: str, pair: Pair, order: int) -> None:
    s, t = pair
    assume(name != "dist" or len(s) > 2)  # two numbers correlate by 1 or -1, and the gradient is what rounding leaves
    rows = torch.randperm(len(s), generator=torch.Generator().manual_seed(order))
    classes = torch.randperm(s.shape[1], generator=torch.Generator().manual_seed(order + 1))
    loss, g = gradient(LOSSES[name], s, t)
    other, h = gradient(LOSSES[name], permuted(s, rows, classes), permuted(t, rows, classes))
    no_more_than(1e-5, "loss", other, loss)
    no_more_than(2e-5, "gradient", h, permuted(g, rows, classes), 2e-5)


@pytest.mark.parametrize("name", list(LOSSES))
@given(pair=shapes().flatmap(of_numbers), offset=st.sampled_from([1.0, -64.0, 1024.0]))
def test_a_constant_added_to_a_row_does_not_matter_and_gradients_sum_to_0(name: str, pair: Pair, offset: float) -> None:
    s, t = ((x * 1024).round() / 1024 for x in pair)  # so that the sum is exact
    loss, g = gradient(LOSSES[name], s, t)
    other, h = gradient(LOSSES[name], s + offset, t - offset)
    no_more_than(1e-5, "loss", other, loss, 1e-6)
    no_more_than(1e-5, "gradient", h, g, 1e-6)
    assert (g.sum(1).abs() <= 1e-6 * g.abs().sum(1) + 1e-6).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@given(pair=shapes().flatmap(of_numbers), temperature=temperatures)
def test_divergences_are_not_negative_and_0_of_equals(divergence: str, pair: Pair, temperature: float) -> None:
    s, t = pair
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    assert (kd_loss(s, t, **options) >= 0).all()
    loss, g = gradient(lambda s, t: kd_loss(s, t, **options), s, s)
    assert (loss == 0).all()
    assert (g == 0).all()


@given(pair=shapes().flatmap(of_numbers), target=seeds)
def test_other_losses_of_equals_are_0(pair: Pair, target: int) -> None:
    s, _ = pair
    label = torch.randint(s.shape[1], (len(s),), generator=torch.Generator().manual_seed(target)).to(DEVICE)
    maps = s.reshape(len(s), 1, 1, -1)
    losses = {
        "decoupled": lambda s, t: stkd_loss(s, t, label, ce_weight=0.0, decouple=(1.0, 8.0)),
        "mlld": mlld,
        "cwd": lambda s, t: cwd_loss(s.view_as(maps), t.view_as(maps)),
    }
    for name, loss in losses.items():
        value, g = gradient(loss, s, s)
        assert value == 0, name
        assert g.abs().max() < 1e-6, name


@given(data=st.data(), pair=shapes().flatmap(of_numbers), temperature=temperatures)
def test_the_decoupled_parts_make_the_whole(data: st.DataObject, pair: Pair, temperature: float) -> None:
    """KL = TCKD + S_t NCKD, S_t the teacher's mass off the label."""
    s, t = (x.double() for x in pair)
    target = data.draw(labels(*s.shape, ignore=None))
    options: dict[str, Any] = {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": temperature, "reduction": "none"}
    whole = stkd_loss(s, t, target, **options)
    target_part, rest = (stkd_loss(s, t, target, decouple=w, **options) for w in ((1.0, 0.0), (0.0, 1.0)))
    mass = 1 - (t / temperature).softmax(1).gather(1, target[:, None])[:, 0]
    no_more_than(1e-9, "whole", target_part + mass * rest, whole, 1e-10)


@given(pair=shapes().flatmap(of_numbers))
def test_at_a_high_temperature_kd_is_half_the_variance_of_the_difference(pair: Pair) -> None:
    s, t = pair
    limit = (s.double() - t.double()).var(1, correction=0) / 2
    no_more_than(2e-3, "limit", kd_loss(s, t, temperature=2e4, reduction="none"), limit, 1e-6)


@given(data=st.data(), pair=shapes().flatmap(of_numbers))
def test_a_lam_of_1_or_0_is_one_label(data: st.DataObject, pair: Pair) -> None:
    s, t = pair
    a, b = (data.draw(labels(*s.shape, ignore=None)) for _ in range(2))
    one, g = gradient(lambda s, t: stkd_loss(s, t, a, b, 1.0), s, t)
    other, h = gradient(lambda s, t: stkd_loss(s, t, b, a, 0.0), s, t)
    alone, k = gradient(lambda s, t: stkd_loss(s, t, a), s, t)
    for x, y in ((one, alone), (other, alone), (g, k), (h, k)):
        no_more_than(1e-6, "label", x, y, 1e-7)


@given(data=st.data(), pair=shapes().flatmap(of_numbers))
def test_rows_to_ignore_are_as_if_they_were_not_there(data: st.DataObject, pair: Pair) -> None:
    s, t = pair
    target = data.draw(labels(*s.shape))
    keep = target != -100
    for loss in (stkd_loss, nkd_loss):
        value, g = gradient(lambda s, t, loss=loss: loss(s, t, target), s, t)
        without, h = gradient(lambda s, t, loss=loss: loss(s, t, target[keep]), s[keep], t[keep])
        no_more_than(1e-6, "loss", value, without, 1e-7)
        no_more_than(1e-6, "gradient", g[keep], h, 1e-7)
        assert (g[~keep] == 0).all()


@given(pair=shapes().flatmap(of_numbers), scale=st.sampled_from([0.5, 4.0, 64.0]))
def test_standardised_logits_have_no_scale(pair: Pair, scale: float) -> None:
    s, t = pair
    loss = lambda s, t: kd_loss(s, t, standardize=True)  # noqa: E731
    value, g = gradient(loss, s, t)
    other, h = gradient(loss, s * scale, t / scale)
    no_more_than(1e-4, "loss", other, value, 1e-5)
    no_more_than(1e-4, "gradient", h * scale, g, 1e-5)
    assert ((g * (s - s.mean(1, keepdim=True))).sum(1).abs() <= 1e-4).all()
