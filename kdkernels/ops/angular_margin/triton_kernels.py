"""angular_margin in Triton: the energies as in energy, work on the small maps, a sum.

Maps are in blocks of up to 1024 pixels, or 256 with quadrants, which take a row of the tile for each region.
"""

from __future__ import annotations

from torch import Tensor

from ..energy.triton_kernels import Energies, energies_of_pairs, reduced
from ..triton_common import device_reason, grouped, launch, power_of_2
from .op import ActivationPairs
from .triton_forward import maps_kernel


def supports(*tensors: Tensor) -> str | None:
    return device_reason(*tensors)


def forward(x: ActivationPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
    energies = energies_of_pairs(x.student, x.teacher, need_grad)
    _launch_maps(x, energies)
    return reduced(energies.losses, x.per_layer, x.per_sample), energies.kappa


def _launch_maps(x: ActivationPairs, energies: Energies) -> None:
    pairs, r, kappa, losses = energies
    batch, factors = losses.shape[1], x.factors()
    regions = 8 if x.local_weight else 1
    largest = max((item.x.shape[2] * item.x.shape[3] for item in pairs), default=1)
    block = power_of_2(largest, 16, 256 if x.local_weight else 1024)
    for group in grouped(pairs, lambda item: None):
        launch(
            maps_kernel,
            len(group) * batch,
            losses.device,
            r=r,
            kappa=kappa,
            losses=losses,
            P=r.shape[1],
            B=batch,
            offsets=tuple(item.offset for item in group),
            heights=tuple(item.x.shape[2] for item in group),
            widths=tuple(item.x.shape[3] for item in group),
            factors=tuple(factors[item.layer] for item in group),
            layers=tuple(item.layer for item in group),
            margin=x.margin,
            sharpness=x.sharpness,
            local_weight=x.local_weight,
            REGIONS=regions,
            NEED_GRAD=kappa.numel() > 0,
            BLOCK=block,
            num_warps=4 if regions * block <= 512 else 8,
        )
