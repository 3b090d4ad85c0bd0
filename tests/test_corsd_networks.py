"""CORSD's relation networks: their layers, parameters and outputs."""

from __future__ import annotations

import torch
from torch import nn

from kdkernels import CORSDLoss


def test_parameter_counts_at_resnet18_widths() -> None:
    """R1 1.288 M, R2 1.236 M, R3 1.033 M, R4 0.366 M."""
    loss = CORSDLoss((64, 128, 256, 512), 100)
    counts = [sum(p.numel() for p in r.parameters()) for r in loss.relations]
    assert counts == [1_287_781, 1_235_557, 1_032_805, 365_669]
    trunks = [[b[5].out_channels for b in r.trunk] for r in loss.relations]
    assert trunks == [[256, 512, 1024], [512, 1024], [1024], []]
    convolutions = [m for m in loss.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.bias is None for m in convolutions)
    assert sorted({(m.kernel_size, m.stride, m.groups == m.in_channels) for m in convolutions}) == [
        ((1, 1), (1, 1), False),
        ((3, 3), (1, 1), True),
        ((3, 3), (2, 2), True),
    ]
    assert [r.relation[0].out_features for r in loss.relations] == [128, 128, 128, 256]
    features = [torch.randn(3, c, 32 >> i, 32 >> i) for i, c in enumerate((64, 128, 256, 512))]
    shapes = []
    for net, f in zip(loss.eval().relations, features, strict=True):
        r, q = net(f[:2], f[1:])
        assert ((r > 0) & (r < 1)).all()
        shapes.append((tuple(net.trunk(torch.cat([f, f], 1)).shape), tuple(r.shape), tuple(q.shape)))
    assert shapes == [((3, 1024, 4, 4), (2,), (2, 100))] * 4
