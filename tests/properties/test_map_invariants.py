"""What losses of feature maps do not depend on: then the gradient is across it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from invariance import Pair, gradient, no_more_than, of_numbers, permuted
from strategies import seeds
from torch import Tensor

import kdkernels
from kdkernels import amd_loss, at_loss, ft_loss, ickd_loss, nst_loss

pytestmark = pytest.mark.usefixtures("backend")


def local(s: Tensor, t: Tensor) -> Tensor:
    return amd_loss(s, t, local_weight=0.2)


def fsp(s: Tensor, t: Tensor) -> Tensor:
    return kdkernels.fsp_loss([s, s * s], [t, t * t])


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "at": at_loss,
    "ft": ft_loss,
    "amd": amd_loss,
    "local": local,
    "nst": nst_loss,
    "ickd": ickd_loss,
    "fsp": fsp,
}
WITHOUT_SCALE = {"at": at_loss, "ft": ft_loss, "nst": nst_loss, "ickd": ickd_loss}
SIDES = st.sampled_from([2, 3, 5])
MAPS = st.tuples(st.sampled_from([1, 2, 5]), st.sampled_from([2, 3, 7]), SIDES, SIDES).flatmap(of_numbers)


@pytest.mark.parametrize("name", list(LOSSES))
@given(pair=MAPS, order=seeds)
def test_the_order_of_samples_and_channels_does_not_matter(name: str, pair: Pair, order: int) -> None:
    """Of the channels of both networks together; each network's own but for FSP and ICKD."""
    s, t = pair
    generator = torch.Generator().manual_seed(order)
    samples, channels, others = (torch.randperm(n, generator=generator) for n in (*s.shape[:2], s.shape[1]))
    if name in ("fsp", "ickd"):
        others = channels
    loss, g = gradient(LOSSES[name], s, t)
    other, h = gradient(LOSSES[name], permuted(s, samples, channels), permuted(t, samples, others))
    no_more_than(1e-5, "loss", other, loss, 1e-9)
    no_more_than(1e-4, "gradient", h, permuted(g, samples, channels), 1e-7)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "local"])
@given(pair=MAPS, order=seeds)
def test_the_order_of_pixels_does_not_matter(name: str, pair: Pair, order: int) -> None:
    s, t = pair
    pixels = torch.randperm(s[0, 0].numel(), generator=torch.Generator().manual_seed(order)).to(s.device)

    def moved(x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, pixels].view(x.shape)

    loss, g = gradient(LOSSES[name], s, t)
    other, h = gradient(LOSSES[name], moved(s), moved(t))
    no_more_than(1e-5, "loss", other, loss, 1e-9)
    no_more_than(1e-4, "gradient", h, moved(g), 1e-7)


@pytest.mark.parametrize("name", list(LOSSES))
@given(pair=MAPS)
def test_equals_are_0(name: str, pair: Pair) -> None:
    loss, g = gradient(LOSSES[name], pair[0], pair[0])
    assert loss.abs() < 1e-12  # squares of rounding errors
    assert g.abs().max() < 1e-6


@pytest.mark.parametrize("name", list(WITHOUT_SCALE))
@given(pair=MAPS, exponents=st.tuples(st.integers(-6, 6), st.integers(-6, 6)))
def test_the_scale_of_a_sample_does_not_matter(name: str, pair: Pair, exponents: tuple[int, int]) -> None:
    s, t = pair
    scales = torch.full((len(s), 1, 1, 1), 2.0 ** exponents[1], device=s.device)
    scales[0] = 2.0 ** exponents[0]
    loss, g = gradient(WITHOUT_SCALE[name], s, t)
    other, h = gradient(WITHOUT_SCALE[name], s * scales, t / scales)
    no_more_than(1e-5, "loss", other, loss, 1e-9)
    no_more_than(1e-4, "gradient", h * scales, g, 1e-6)
    along = (g * s).flatten(1).sum(1).abs()
    assert (along <= 2e-6 * (g.flatten(1).norm(dim=1) * s.flatten(1).norm(dim=1) + 1)).all()


@given(pair=MAPS, seed=seeds)
def test_the_scale_of_a_channel_does_not_matter_to_nst(pair: Pair, seed: int) -> None:
    s, t = pair
    generator = torch.Generator().manual_seed(seed)
    scales = 2.0 ** torch.randint(-4, 5, (1, s.shape[1], 1, 1), generator=generator).to(s.device)
    loss, g = gradient(nst_loss, s, t)
    other, h = gradient(nst_loss, s * scales, t)
    no_more_than(1e-5, "loss", other, loss, 1e-9)
    no_more_than(1e-4, "gradient", h * scales, g, 1e-6)
    assert ((g * s).sum((2, 3)).abs() <= 1e-5).all()


@given(pair=MAPS, sign=seeds)
def test_signs_do_not_matter_to_energies(pair: Pair, sign: int) -> None:
    s, t = pair
    signs = torch.randint(2, s.shape, generator=torch.Generator().manual_seed(sign)).to(s.device) * 2 - 1
    for loss in (at_loss, ft_loss, amd_loss, local):
        value, g = gradient(loss, s, t)
        other, h = gradient(loss, s * signs, t)
        assert torch.equal(other, value)
        assert torch.equal(h * signs, g)


@given(pair=MAPS, power=st.sampled_from([1.0, 2.0, 3.0]))
def test_an_energy_is_homogeneous_and_normalised_of_length_1(pair: Pair, power: float) -> None:
    s, _ = pair
    plain, unit = kdkernels.energy(s, power), kdkernels.energy(s, power, normalize=True)
    no_more_than(1e-6, "scaled", kdkernels.energy(4 * s, power), plain * 4**power)
    no_more_than(1e-6, "length", unit.flatten(1).norm(dim=1), torch.ones_like(s[:, 0, 0, 0]))
    value, g = gradient(lambda x, _: kdkernels.energy(x, power), s, s)
    no_more_than(1e-5, "Euler", (g * s).sum(), power * value.sum())  # <dE/dx, x> = p E


@given(pair=MAPS)
def test_products_of_channels(pair: Pair) -> None:
    s, t = pair
    both = kdkernels.channel_gram(s)
    no_more_than(1e-6, "symmetry", both, both.mT)
    no_more_than(1e-6, "trace", both.diagonal(dim1=1, dim2=2).sum(1), s.square().sum((1, 2, 3)))
    no_more_than(1e-6, "two", kdkernels.channel_gram(s, t), kdkernels.channel_gram(t, s).mT, 1e-6)
