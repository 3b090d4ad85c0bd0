"""Mixed images and their two labels: mixup and cutmix, what ``stkd_loss`` takes."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.checks import check_positive, check_tensor

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
        generator: a CPU generator for reproducible draws. PyTorch's default CPU generator stands in for it meanwhile,
            so other threads should not draw from that at the same time.
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
    """A box of x[pi] pasted into x; lam is the share of x that is left (arXiv 1905.04899). Arguments as in ``mixup``.

    The box covers about 1 - lam of the image, lam ~ Beta(alpha, alpha), around a uniform centre, and is cut off at the
    border; the lam that is returned counts its pixels. images: (B, C, H, W).
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
    check_positive(alpha=alpha)
    if alpha < 0.01:  # both of Beta's gamma draws would underflow now and then, and lam be 0.5
        raise ValueError(f"alpha must be 0.01 or more, got {alpha}")
    check_tensor("images", images)
    check_tensor("target", target)
    if not images.is_floating_point():
        raise TypeError(f"images must be floating-point to be mixed, got {images.dtype}")
    if images.shape[0] != target.shape[0]:
        raise ValueError(f"images and target differ in B: {tuple(images.shape)} and {tuple(target.shape)}")
    lam = _beta(alpha, images.shape[0] if per_sample else 1, generator).float()
    order = torch.randperm(images.shape[0], generator=generator)
    lam = lam if per_sample else lam[0]
    return lam.to(images.device, non_blocking=True), order.to(images.device, non_blocking=True)


def _beta(alpha: float, count: int, generator: torch.Generator | None) -> Tensor:
    """(count,) draws of Beta(alpha, alpha), which torch.distributions makes from the default generator alone."""
    concentration = torch.tensor(alpha, dtype=torch.float64)
    distribution = torch.distributions.Beta(concentration, concentration)
    if generator is None:
        return distribution.sample((count,))
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        lam = distribution.sample((count,))
        generator.set_state(torch.get_rng_state())
    return lam


def _per_image(lam: Tensor, images: Tensor) -> Tensor:
    return lam.view(-1, *(1,) * (images.dim() - 1)) if lam.dim() else lam
