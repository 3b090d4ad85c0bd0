"""Half precision, autocast, channels_last, confident networks, mixed labels: held against the formula in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import originals
import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE, HALF, check_close, gradients
from torch import Tensor

from kdkernels.compat import kd_zoo, mdistiller, repdistiller, torchdistill

ROOT = Path(__file__).parents[2]


def sp_presets(s: Tensor, t: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Each preset's loss, 1 / B^2, and the norm of its rows."""
    spkd = torchdistill.SPKDLoss("a", "a", "batchmean")({"a": {"output": s}}, {"a": {"output": t}})
    return {
        "repdistiller": (repdistiller.Similarity()([s], [t])[0].squeeze(), 2),
        "mdistiller": (mdistiller.sp_loss([s], [t]).squeeze(), 2),
        "kd_zoo": (kd_zoo.SP()(s, t), 2),
        "torchdistill": (spkd, 1),
    }


def kd_presets(s: Tensor, t: Tensor, temperature: float = 4.0) -> dict[str, tuple[Tensor, float]]:
    """Each preset's loss and its factor to the sum of the KL over the positions, for (N, C, H, W)."""
    kd = torchdistill.KDLoss("a", "output", "a", "output", temperature)({"a": {"output": s}}, {"a": {"output": t}})
    n, t2 = max(len(s), 1), temperature**2
    return {
        "repdistiller": (repdistiller.DistillKL(temperature)(s, t), t2 / n),
        "mdistiller": (mdistiller.kd_loss(s, t, temperature), t2 / (n * s.shape[2:].numel())),
        "kd_zoo": (kd_zoo.SoftTarget(temperature)(s, t), t2 / n),
        "torchdistill": (kd, 1 / n),
    }


def check_sp(s: Tensor, t: Tensor) -> None:
    s, exact = s.requires_grad_(), s.detach().double().requires_grad_()
    for name, (loss, norm) in sp_presets(s, t).items():
        expected = originals.sp(exact, t.double(), norm) / len(s) ** 2
        check_close(name, loss, expected, 1e-5)
        check_close(name, *(gradients(x, [y], 1e6)[0] for x, y in ((loss, s), (expected, exact))), 1e-5, s.dtype)


def check_kd(s: Tensor, t: Tensor) -> None:
    s, exact = s.requires_grad_(), s.detach().double().requires_grad_()
    for name, (loss, factor) in kd_presets(s, t).items():
        expected = factor * originals.kl(exact, t.double(), 4.0).sum()
        check_close(name, loss, expected, 1e-5)
        check_close(name, *(gradients(x, [y], 4096.0)[0] for x, y in ((loss, s), (expected, exact))), 1e-5, s.dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_and_autocast(dtype: torch.dtype, autocast: bool, backend: str) -> None:
    features = [(3 * torch.randn(16, 512, 7, 7)).relu().to(DEVICE, dtype) for _ in range(2)]
    logits = [(3 * torch.randn(16, 20, 3, 3)).to(DEVICE, dtype) for _ in range(2)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        check_sp(*features)
        check_kd(*logits)
    if dtype == torch.float16:
        assert originals.sp(*features).isnan()  # a Gram diagonal beyond 65504


def views(*shape: int) -> dict[str, Tensor]:
    return {
        "channels_last": torch.randn(shape).to(memory_format=torch.channels_last),
        "transposed": torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2),
        "sliced": torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
        "expanded": torch.randn(*shape[:-1], 1).expand(shape),
    }


@pytest.mark.parametrize("layout", views(1, 1, 1, 1))
def test_any_strides(layout: str, backend: str) -> None:
    s, t = (views(6, 5, 4, 3)[layout].to(DEVICE) for _ in range(2))
    assert not s.is_contiguous()
    check_sp(s, t)
    check_kd(s, t)


def test_dkd_of_confident_networks(backend: str) -> None:
    labels = torch.arange(8, device=DEVICE)
    own = F.one_hot(labels, 10).bool()
    s, t = (torch.randn(8, 10).to(DEVICE) + 115.0 * own for _ in range(2))  # the other classes' mass underflows
    assert not originals.dkd(s, t, own, 1.0, 8.0, 1.0).isfinite()
    s, exact = s.requires_grad_(), s.detach().double().requires_grad_()
    loss = mdistiller.dkd_loss(s, t, labels, 1.0, 8.0, 1.0)
    expected = originals.dkd(exact, t.double(), own, 1.0, 8.0, 1.0)
    check_close("loss", loss, expected, 1e-5)
    check_close("gradient", gradients(loss, [s])[0], gradients(expected, [exact])[0], 1e-5)


def two_hot(a: Sequence[int], b: Sequence[int], lam: float, classes: int = 10) -> Tensor:
    one, two = (F.one_hot(torch.tensor(x), classes).float() for x in (a, b))
    return (lam * one + (1 - lam) * two).to(DEVICE)


@pytest.mark.parametrize("lam", [0.2, 0.5, 0.9])
def test_dkd_takes_mixed_labels(lam: float, backend: str) -> None:
    target = two_hot([1, 2, 3, 9], [4, 0, 8, 5], lam)
    s, t = (torch.randn(4, 10).to(DEVICE) for _ in range(2))
    s, exact = s.requires_grad_(), s.detach().double().requires_grad_()
    loss = mdistiller.dkd_loss(s, t, target, 1.0, 8.0, 4.0)
    expected = originals.dkd(exact, t.double(), target > 0, 1.0, 8.0, 4.0, classes=2)
    check_close("loss", loss, expected, 1e-6)
    check_close("gradient", gradients(loss, [s], 3.7)[0], gradients(expected, [exact], 3.7)[0], 1e-6)


def test_dkd_of_rows_with_one_label() -> None:
    s, t = (torch.randn(3, 10).to(DEVICE) for _ in range(2))
    expected = mdistiller.dkd_loss(s, t, torch.tensor([1, 2, 3], device=DEVICE), 1.0, 8.0, 4.0)
    assert torch.equal(mdistiller.dkd_loss(s, t, two_hot([1, 2, 3], [1, 2, 3], 0.3), 1.0, 8.0, 4.0), expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="targets are checked on the CPU alone; elsewhere such rows give NaN")
def test_dkd_names_dense_targets_it_cannot_read() -> None:
    s, t = torch.randn(2, 10), torch.randn(2, 10)
    smoothed = 0.9 * two_hot([1, 2], [3, 4], 0.6).cpu() + 0.01
    with pytest.raises(ValueError, match="one or two positive entries in each row, got 10 in row 0"):
        mdistiller.dkd_loss(s, t, smoothed, 1.0, 8.0, 4.0)
    with pytest.raises(ValueError, match="got 0 in row 1"):
        mdistiller.dkd_loss(s, t, torch.tensor([[1.0] + [0.0] * 9, [0.0] * 10]), 1.0, 8.0, 4.0)
    with pytest.raises(ValueError, match=r"shape \(2, 10\), got \(2, 4\)"):
        mdistiller.dkd_loss(s, t, torch.ones(2, 4), 1.0, 8.0, 4.0)


def test_an_empty_batch_gives_zero() -> None:
    maps, logits = torch.empty(0, 3, 2, 2, device=DEVICE), torch.empty(0, 4, device=DEVICE)
    losses = [loss for loss, _ in (*sp_presets(maps, maps).values(), *kd_presets(maps, maps).values())]
    losses.append(mdistiller.dkd_loss(logits, logits, torch.empty(0, dtype=torch.int64, device=DEVICE), 1.0, 8.0, 4.0))
    losses += [repdistiller.Correlation()(logits, logits), *repdistiller.Attention(3)([maps], [maps])]
    losses += [kd_zoo.AT(2)(maps, maps), kd_zoo.IRG(1, 1, 1)(*[[maps, maps, logits, logits]] * 2)]
    assert torch.stack(losses).tolist() == [0.0] * 13


def test_a_teacher_that_wants_a_gradient_is_told() -> None:
    s, t = torch.randn(3, 4, 2, 2, requires_grad=True), torch.randn(3, 4, 2, 2, requires_grad=True)
    for presets in (sp_presets, kd_presets):
        with pytest.warns(UserWarning, match="teacher's tensor requires a gradient and gets none") as caught:
            loss = sum(loss for loss, _ in presets(s, t).values())
        assert len(caught) == 4
        loss.backward()
    assert s.grad.norm() > 0
    assert t.grad is None


def test_torchdistill_refuses_a_reduction_that_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="reduction must be one of 'batchmean', 'sum', 'mean', 'none', got 'max'"):
        torchdistill.KDLoss("a", "output", "a", "output", 4.0, reduction="max")


def test_importing_the_torchdistill_preset_registers_it_after_the_originals(tmp_path: Path) -> None:
    """With a torchdistill of four lines: the real one needs torchvision; docs/torchdistill.md tells of a real run."""
    losses = tmp_path / "torchdistill" / "losses"
    losses.mkdir(parents=True)
    (tmp_path / "torchdistill" / "__init__.py").touch()
    (losses / "__init__.py").touch()
    (losses / "registry.py").write_text(
        "LOSSES = {}\ndef register_mid_level_loss(loss):\n    LOSSES[loss.__name__] = loss\n    return loss\n"
    )
    (losses / "mid_level.py").write_text(
        "from .registry import register_mid_level_loss\n"
        "@register_mid_level_loss\nclass KDLoss: pass\n"
        "@register_mid_level_loss\nclass SPKDLoss: pass\n"
        "@register_mid_level_loss\nclass CRDLoss: pass\n"
    )
    code = (
        "import kdkernels.compat.torchdistill as ours; import torchdistill.losses.mid_level as theirs\n"
        "from torchdistill.losses.registry import LOSSES\n"
        "expected = {loss.__name__: loss for loss in ours.LOSSES} | {'CRDLoss': theirs.CRDLoss}\n"
        "assert LOSSES == expected and len(expected) == 11, LOSSES"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
