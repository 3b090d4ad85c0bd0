"""What losses of features do not depend on: then the gradient is across it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from invariance import Pair, gradient, no_more_than, of_numbers, permuted, shapes
from strategies import seeds
from torch import Tensor

import kdkernels
from kdkernels import cc_loss, irg_loss, pkt_loss, rkd_loss, sp_loss

pytestmark = pytest.mark.usefixtures("backend")


def correlation(s: Tensor, t: Tensor) -> Tensor:
    return kdkernels.correlation_loss(s, t, views=1)


def supervised(s: Tensor, t: Tensor) -> Tensor:
    return kdkernels.supervised_contrastive_loss(s, t, torch.arange(len(s), device=s.device) % 2)


OF_BATCHES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sp": sp_loss,
    "rkd": rkd_loss,
    "irg": irg_loss,
    "pkt": pkt_loss,
    "cc": cc_loss,
    "correlation": correlation,
}
OF_COSINES = {"pkt": pkt_loss, "cc": cc_loss, "correlation": correlation, "supervised": supervised}
OF_DISTANCES = {"rkd": rkd_loss, "irg": irg_loss}


def in_general(name: str, s: Tensor) -> bool:
    """PKT of opposite rows, which there are in a plane, is the logarithm of 0 and what is added to it."""
    return name != "pkt" or s.shape[1] > 2


BATCHES = shapes(columns=(2, 7, 61)).flatmap(of_numbers)


@pytest.mark.parametrize("name", list(OF_BATCHES))
@given(pair=BATCHES, order=seeds)
def test_neither_the_order_of_samples_nor_of_features_matters(name: str, pair: Pair, order: int) -> None:
    s, t = pair
    assume(in_general(name, s))
    generator = torch.Generator().manual_seed(order)
    rows, columns, others = (torch.randperm(n, generator=generator) for n in (len(s), s.shape[1], t.shape[1]))
    loss, g = gradient(OF_BATCHES[name], s, t)
    other, h = gradient(OF_BATCHES[name], permuted(s, rows, columns), permuted(t, rows, others))
    no_more_than(2e-5, "loss", other, loss, 1e-9)
    no_more_than(1e-4, "gradient", h, permuted(g, rows, columns), 1e-7)


@pytest.mark.parametrize("name", list(OF_BATCHES))
@given(pair=BATCHES, order=seeds)
def test_turned_features_are_the_same(name: str, pair: Pair, order: int) -> None:
    s, t = (x.double() for x in pair)
    noise = torch.randn(s.shape[1], s.shape[1], generator=torch.Generator().manual_seed(order), dtype=torch.float64)
    turn = torch.linalg.qr(noise).Q.to(s.device)
    loss, g = gradient(OF_BATCHES[name], s, t)
    other, h = gradient(OF_BATCHES[name], s @ turn, t)
    no_more_than(1e-9, "loss", other, loss, 1e-12)
    no_more_than(1e-7, "gradient", h, g @ turn, 1e-10)


@pytest.mark.parametrize("name", list(OF_BATCHES))
@given(pair=BATCHES)
def test_equals_are_0(name: str, pair: Pair) -> None:
    assume(in_general(name, pair[0]))
    loss, g = gradient(OF_BATCHES[name], pair[0], pair[0])
    assert loss.abs() < 1e-9
    assert g.abs().max() < 1e-6


@pytest.mark.parametrize("name", list(OF_BATCHES))
@given(pair=BATCHES, scale=st.sampled_from([0.25, 0.5, 3.0, 16.0]))
def test_the_scale_of_a_network_does_not_matter(name: str, pair: Pair, scale: float) -> None:
    """d/dc of L(c x) is <gradient, x> = 0, and a gradient at c x is 1 / c of that at x."""
    s, t = pair
    assume(in_general(name, s))
    loss, g = gradient(OF_BATCHES[name], s, t)
    other, h = gradient(OF_BATCHES[name], s * scale, t / scale)
    no_more_than(1e-4, "loss", other, loss, 1e-5)  # PKT adds 1e-7 to a length
    no_more_than(2e-4, "gradient", h * scale, g, 1e-5)
    along = (g.double() * s.double()).sum().abs()
    assert along <= 2e-6 * (g.double().norm() * s.double().norm() + 1), f"{along:.3e}"


@pytest.mark.parametrize("name", list(OF_COSINES))
@given(pair=BATCHES, seed=seeds)
def test_the_length_of_each_row_does_not_matter_to_cosines(name: str, pair: Pair, seed: int) -> None:
    s, t = pair
    assume(in_general(name, s))
    lengths = 2.0 ** torch.randint(-4, 5, (len(s), 1), generator=torch.Generator().manual_seed(seed)).to(s.device)
    loss, g = gradient(OF_COSINES[name], s, t)
    other, h = gradient(OF_COSINES[name], s * lengths, t / lengths)
    no_more_than(1e-4, "loss", other, loss, 1e-6)
    no_more_than(2e-4, "gradient", h * lengths, g, 1e-5)
    assert ((g * s).sum(1).abs() <= 2e-6 * (g.norm(dim=1) * s.norm(dim=1) + 1)).all()


@pytest.mark.parametrize("name", list(OF_DISTANCES))
@given(pair=BATCHES, shift=st.sampled_from([1.0, -64.0, 1024.0]))
def test_moving_all_rows_does_not_matter_to_distances(name: str, pair: Pair, shift: float) -> None:
    s, t = ((x * 1024).round() / 1024 for x in pair)  # so that the sum is exact
    loss, g = gradient(OF_DISTANCES[name], s, t)
    other, h = gradient(OF_DISTANCES[name], s + shift, t - shift)
    no_more_than(1e-6, "loss", other, loss)
    no_more_than(1e-5, "gradient", h, g, 1e-6)
    assert (g.sum(0).abs() <= 1e-5 * g.abs().sum(0) + 1e-6).all()


@given(pair=BATCHES)
def test_products(pair: Pair) -> None:
    """A Gram matrix is symmetric, its diagonal the squared lengths; cosines are between -1 and 1."""
    s, t = pair
    both, cosines = kdkernels.gram(s), kdkernels.cosine_similarity(s, t)
    no_more_than(1e-6, "symmetry", both, both.T)
    no_more_than(1e-6, "diagonal", both.diagonal(), s.square().sum(1))
    no_more_than(1e-6, "two", kdkernels.gram(s, t), s.double() @ t.double().T, 1e-6)
    assert (cosines.abs() <= 1 + 1e-6).all()
    no_more_than(1e-6, "one's own cosine", kdkernels.cosine_similarity(s).diagonal(), torch.ones_like(s[:, 0]))


@given(pair=BATCHES, scale=st.sampled_from([0.5, 3.0]))
def test_alignment_is_between_0_and_4(pair: Pair, scale: float) -> None:
    s, t = pair
    rows = kdkernels.alignment_loss(s, t, reduction="none")
    assert (rows >= 0).all()
    assert (rows <= 4 + 1e-5).all()
    no_more_than(1e-5, "opposites", kdkernels.alignment_loss(s, -t, reduction="none"), 4 - rows)
    no_more_than(1e-5, "scaled", kdkernels.alignment_loss(s * scale, t, reduction="none"), rows, 1e-6)
    _, g = gradient(kdkernels.alignment_loss, s, t)
    assert ((g * s).sum(1).abs() <= 1e-6).all()


@given(pair=BATCHES)
def test_mlkd_is_the_sum_of_its_terms(pair: Pair) -> None:
    s, t = pair
    target = torch.arange(len(s), device=s.device) % 2
    parts = 50 * correlation(s, t) + kdkernels.supervised_contrastive_loss(s, t, target)
    parts = parts + 20 * kdkernels.alignment_loss(s, t)
    no_more_than(1e-5, "sum", kdkernels.mlkd_loss(s, t, target, views=1), parts)


@given(pair=BATCHES)
def test_neighbours_are_0_of_equals_and_of_one_row(pair: Pair) -> None:
    s, t = pair
    for value, g in (
        gradient(kdkernels.neighbour_correlation_loss, s, s),
        gradient(kdkernels.neighbour_correlation_loss, s[:1], t[:1]),
    ):
        assert value == 0
        assert (g == 0).all()
    assert kdkernels.neighbour_correlation_loss(s, t) >= 0
