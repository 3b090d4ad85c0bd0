"""mixup and cutmix: what they mix, what they return, and how lam is drawn."""

from __future__ import annotations

import pytest
import torch
from checking import DEVICE

from kdkernels import cutmix, mixup


def test_mixup_mixes_images_as_labels() -> None:
    images, target = torch.randn(16, 3, 4, 4, dtype=torch.float64, device=DEVICE), torch.arange(16, device=DEVICE)
    for per_sample in (False, True):
        out, a, b, lam = mixup(images, target, generator=torch.Generator().manual_seed(1), per_sample=per_sample)
        weight = lam.double().view(-1, 1, 1, 1)
        torch.testing.assert_close(out, weight * images[a] + (1 - weight) * images[b])
        assert torch.equal(a, target)
        assert torch.equal(b.sort()[0], target)
        assert lam.shape == ((16,) if per_sample else ())
        again = mixup(images, target, generator=torch.Generator().manual_seed(1), per_sample=per_sample)
        assert all(torch.equal(x, y) for x, y in zip(again, (out, a, b, lam), strict=True))


def test_mixup_lam_is_beta() -> None:
    images, target = torch.zeros(20000, 1, device=DEVICE), torch.zeros(20000, dtype=torch.int64, device=DEVICE)
    for alpha in (0.2, 1.0, 4.0):
        lam = mixup(images, target, alpha=alpha, per_sample=True, generator=torch.Generator().manual_seed(0))[3]
        assert lam.mean().item() == pytest.approx(0.5, abs=0.01)
        assert lam.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


@pytest.mark.parametrize("per_sample", [False, True])
def test_cutmix_counts_its_pixels(per_sample: bool) -> None:
    target = torch.arange(12, device=DEVICE)
    images = target.double().view(12, 1, 1, 1).expand(12, 2, 9, 7)
    out, a, b, lam = cutmix(images, target, generator=torch.Generator().manual_seed(3), per_sample=per_sample)
    kept = out == a.view(12, 1, 1, 1)
    assert (kept | (out == b.view(12, 1, 1, 1))).all()
    moved = a != b
    share = kept.double().mean((1, 2, 3))
    torch.testing.assert_close(share[moved], lam.double().expand(12)[moved], atol=1e-6, rtol=0)
    assert 0 < lam.min() < 1
