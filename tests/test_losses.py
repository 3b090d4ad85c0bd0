"""The public losses: their scales, options and modules, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE, HALF, check_close, check_compiled, check_op, gradients
from torch import Tensor

import kdkernels
from kdkernels import (
    AMDLoss,
    KDLoss,
    SPLoss,
    STKDLoss,
    amd_loss,
    cutmix,
    kd_loss,
    mixup,
    sp_loss,
    stkd_loss,
)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def labels(*shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape, device=DEVICE)


# ---- kd_loss


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_kd_is_t2_kl_per_position(temperature: float) -> None:
    s, t = randn(6, 5, 9), randn(6, 5, 9)
    log_q, q = F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1)
    positions = temperature**2 * F.kl_div(log_q, q, reduction="none").sum(-1)
    rows = kd_loss(s, t, temperature=temperature, reduction="none")
    torch.testing.assert_close(rows, positions)
    torch.testing.assert_close(kd_loss(s, t, temperature=temperature), positions.mean())
    torch.testing.assert_close(kd_loss(s, t, temperature=temperature, reduction="sum"), positions.sum())
    plain = kd_loss(s, t, temperature=temperature, scale_by_t2=False)
    torch.testing.assert_close(plain * temperature**2, positions.mean())
    torch.testing.assert_close(KDLoss(temperature)(s, t), positions.mean())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_kd_on_dense_predictions(memory_format: torch.memory_format) -> None:
    s, t = (randn(2, 7, 3, 4).to(memory_format=memory_format).requires_grad_() for _ in range(2))
    rows = kd_loss(s, t, class_dim=1, reduction="none")
    assert rows.shape == (2, 3, 4)
    flat = [x.detach().permute(0, 2, 3, 1).reshape(-1, 7).requires_grad_() for x in (s, t)]
    torch.testing.assert_close(rows.flatten(), kd_loss(*flat, reduction="none"))
    gradient = gradients(kd_loss(s, t, class_dim=1), [s])[0]
    torch.testing.assert_close(gradient.permute(0, 2, 3, 1).reshape(-1, 7), gradients(kd_loss(*flat), [flat[0]])[0])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_at_scale(dtype: torch.dtype, autocast: bool) -> None:
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        big = 3 * randn(4096, 1000, dtype=dtype), 3 * randn(4096, 1000, dtype=dtype)
        # an upstream gradient of a loss scaler's size, or fp16 underflows by its nature
        check_op(kd_loss, big[:1], constants=big[1:], upstream=65536.0)
        maps = [randn(8, 64, 16, 16, dtype=dtype).relu() for _ in range(2)]
        check_op(amd_loss, maps[:1], constants=maps[1:], upstream=1e6)
        features = [randn(64, 2048, 7, 7, dtype=dtype).relu() * 2 for _ in range(2)]  # Gram diagonal beyond 65504
        check_op(sp_loss, features[:1], constants=features[1:], upstream=1e6)


def test_amd_gradient_in_fp32_on_ordinary_features() -> None:
    s, t = randn(64, 64, 16, 16, dtype=torch.float32).relu(), randn(64, 64, 16, 16, dtype=torch.float32).relu()
    check_op(amd_loss, [s], constants=[t])


# ---- stkd_loss


def mixed(n: int = 8, c: int = 11) -> tuple[Tensor, ...]:
    return (
        randn(n, c),
        randn(n, c),
        labels(n, classes=c),
        labels(n, classes=c),
        torch.rand(n, dtype=torch.float64, device=DEVICE),
    )


def test_stkd_is_mixed_ce_and_kd() -> None:
    s, t, a, b, lam = mixed()
    y = lam[:, None] * F.one_hot(a, 11) + (1 - lam[:, None]) * F.one_hot(b, 11)
    ce = -(y * F.log_softmax(s, -1)).sum(-1)
    kd = kd_loss(s, t, reduction="none")
    expected = 0.1 * ce + 0.9 * kd
    torch.testing.assert_close(stkd_loss(s, t, a, b, lam, reduction="none"), expected)
    torch.testing.assert_close(stkd_loss(s, t, a, b, lam), expected.mean())
    torch.testing.assert_close(STKDLoss()(s, t, a, b, lam), expected.mean())
    torch.testing.assert_close(stkd_loss(s, t, y), expected.mean())  # somebody else's mixup
    hard = stkd_loss(s, t, a, ce_weight=1, kd_weight=0)
    torch.testing.assert_close(hard, F.cross_entropy(s, a))
    one = stkd_loss(s, t, a, b, 0.3, ce_weight=1, kd_weight=0)
    torch.testing.assert_close(one, 0.3 * F.cross_entropy(s, a) + 0.7 * F.cross_entropy(s, b))


def test_stkd_over_positions_shares_lam_within_a_sample() -> None:
    s, t = randn(4, 3, 7), randn(4, 3, 7)
    a, b, lam = labels(4, 3, classes=7), labels(4, 3, classes=7), torch.rand(4, dtype=torch.float64, device=DEVICE)
    rows = stkd_loss(s, t, a, b, lam, reduction="none")
    assert rows.shape == (4, 3)
    for i in range(4):
        torch.testing.assert_close(rows[i], stkd_loss(s[i], t[i], a[i], b[i], lam[i], reduction="none"))


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("same", [False, True])
def test_decoupled_identity_and_gradient(lam: float, same: bool) -> None:
    s, t, a, b, _ = mixed()
    b = a if same else (a + 1 + b % 10) % 11
    parts = [
        stkd_loss(s, t, a, b, lam, ce_weight=0, kd_weight=1, decouple=w, reduction="none") for w in ((1, 0), (0, 1))
    ]
    whole = stkd_loss(s, t, a, b, lam, ce_weight=0, kd_weight=1, reduction="none")
    q = F.softmax(t / 4.0, -1)
    rest = 1 - q.gather(1, a[:, None])[:, 0] - (0 if same else q.gather(1, b[:, None])[:, 0])
    torch.testing.assert_close(parts[0] + rest * parts[1], whole, rtol=1e-12, atol=1e-12)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: stkd_loss(x, t, a, b, lam, decouple=(1.0, 8.0), reduction="none"), s)


def test_decoupled_hard_labels_are_dkd() -> None:
    s, t, a, *_ = mixed()
    mask = F.one_hot(a, 11).bool()
    q_s, q_t = F.softmax(s / 4, -1), F.softmax(t / 4, -1)
    binary = [torch.stack([q[mask], 1 - q[mask]], 1) for q in (q_s, q_t)]
    tckd = (binary[1] * (binary[1] / binary[0]).log()).sum(1)
    other = [F.softmax(z[~mask].view(8, 10) / 4, -1) for z in (s, t)]
    nckd = (other[1] * (other[1] / other[0]).log()).sum(1)
    ours = stkd_loss(s, t, a, ce_weight=0, kd_weight=1, decouple=(1.0, 8.0))
    torch.testing.assert_close(ours, 16 * (tckd + 8 * nckd).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decoupled_is_finite_for_huge_logits(dtype: torch.dtype) -> None:
    s, t, a, b, lam = mixed()
    s, t = (s * 1e4).to(dtype).requires_grad_(), (t * 1e4).to(dtype)
    for decouple in ((1.0, 0.0), (0.0, 1.0)):
        loss = stkd_loss(s, t, a, b, lam, decouple=decouple)
        assert loss.isfinite()
        assert gradients(loss, [s])[0].isfinite().all()


def test_both_networks_very_confident() -> None:
    s = torch.zeros(2, 5, device=DEVICE)
    s[:, 1] = 200.0  # the other classes' mass underflows
    s.requires_grad_()
    t = s.detach().clone()
    t[:, 2] = 1.0
    loss = stkd_loss(s, t, torch.ones(2, dtype=torch.int64, device=DEVICE), decouple=(1.0, 8.0), temperature=1.0)
    assert loss.isfinite()
    assert loss > 0
    assert gradients(loss, [s])[0].isfinite().all()


# ---- sp_loss, amd_loss


def test_sp_scale_and_layers() -> None:
    s, t = randn(6, 4, 3, 3), randn(6, 5, 2, 2)
    g = [F.normalize(x.flatten(1) @ x.flatten(1).t()) for x in (s, t)]
    one = (g[0] - g[1]).square().sum()
    torch.testing.assert_close(sp_loss(s, t), one / 36)
    torch.testing.assert_close(sp_loss(s, t, reduction="sum"), one)
    torch.testing.assert_close(sp_loss([s, t], [t, s]), 2 * one / 36)
    torch.testing.assert_close(SPLoss()((s,), (t,)), one / 36)


def test_amd_layers_weights_and_reduction() -> None:
    s = [randn(3, 4, 8, 8).relu(), randn(3, 5, 4, 4).relu()]
    t = [randn(3, 2, 8, 8).relu(), randn(3, 9, 4, 4).relu()]
    each = torch.stack([amd_loss(a, b) for a, b in zip(s, t, strict=True)])
    torch.testing.assert_close(amd_loss(s, t, reduction="none"), each)
    torch.testing.assert_close(amd_loss(s, t), each.mean())
    torch.testing.assert_close(amd_loss(s, t, layer_weights=[2, 3], reduction="sum"), 2 * each[0] + 3 * each[1])
    area = AMDLoss(layer_weights="area", reduction="sum")(s, t)
    torch.testing.assert_close(area, 64.0**2 * each[0] + 16.0**2 * each[1])
    halves = amd_loss(s[0], t[0], local_weight=0.2)
    local = amd_loss(s[0], t[0], local_weight=1.0)
    torch.testing.assert_close(halves, 0.8 * each[0] + 0.2 * local)


@pytest.mark.parametrize("loss", [sp_loss, amd_loss])
def test_gradcheck(loss: Callable[..., Tensor]) -> None:
    s, t = randn(3, 2, 4, 4).requires_grad_(), randn(3, 5, 4, 4)
    assert torch.autograd.gradcheck(lambda x: loss([x, x.exp()], [t, t]), s)


@pytest.mark.parametrize("loss", [sp_loss, amd_loss, kd_loss])
def test_the_teacher_is_a_constant(loss: Callable[..., Tensor]) -> None:
    shape = (3, 4) if loss is kd_loss else (3, 4, 4, 4)
    teacher = randn(*shape).requires_grad_()
    assert not loss(randn(*shape), teacher).requires_grad
    loss(randn(*shape).requires_grad_(), teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", ["kd", "stkd", "sp", "amd"])
def test_whole_losses_compile(name: str) -> None:
    t, target = randn(4, 6, dtype=torch.float32), labels(4, classes=6)
    maps = randn(4, 3, 4, 4, dtype=torch.float32)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "kd": lambda x: kd_loss(x, t),
        "stkd": lambda x: stkd_loss(x, t, target, target.flip(0), 0.3, decouple=(1.0, 2.0)),
        "sp": lambda x: sp_loss([x, x * x], [t, t]),
        "amd": lambda x: amd_loss(x, maps, local_weight=0.2),
    }
    check_compiled(functions[name], maps + 1 if name == "amd" else t + 1)


# ---- mixup, cutmix


def test_mixup_mixes_images_as_labels() -> None:
    images, target = randn(16, 3, 4, 4), torch.arange(16, device=DEVICE)
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


# ---- what cannot be meant


def bad_calls() -> dict[str, tuple[type[Exception], str, Callable[[], object]]]:
    x, y = torch.ones(4, 3, device=DEVICE), torch.ones(4, 5, device=DEVICE)
    maps = torch.ones(2, 3, 4, 4, device=DEVICE)
    a = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    return {
        "kd shapes": (ValueError, r"\(4, 3\) and \(4, 5\)", lambda: kd_loss(x, y)),
        "kd one dimension": (ValueError, "two or more dimensions", lambda: kd_loss(x[0], x[0])),
        "kd class_dim": (ValueError, "class_dim 0", lambda: kd_loss(x, x, class_dim=0)),
        "kd no classes": (ValueError, "no classes", lambda: kd_loss(x[:, :0], x[:, :0])),
        "kd dtype": (TypeError, "int64", lambda: kd_loss(x, x.long())),
        "kd not a tensor": (TypeError, "list", lambda: kd_loss(x, [1.0])),
        "kd reduction": (ValueError, "'mean'", lambda: kd_loss(x, x, reduction="mean")),
        "temperature 0": (ValueError, "got 0", lambda: kd_loss(x, x, temperature=0)),
        "temperature nan": (ValueError, "nan", lambda: KDLoss(math.nan)),
        "temperature tensor": (TypeError, "Tensor", lambda: kd_loss(x, x, temperature=torch.ones(()))),
        "stkd labels": (ValueError, r"\(4,\).*\(3,\)", lambda: stkd_loss(x, x, a[:3])),
        "stkd label dtype": (TypeError, "int32", lambda: stkd_loss(x, x, a.int())),
        "stkd lam alone": (ValueError, "go together", lambda: stkd_loss(x, x, a, lam=0.5)),
        "stkd lam range": (ValueError, "1.5", lambda: stkd_loss(x, x, a, a, 1.5)),
        "stkd lam shape": (ValueError, r"\(3,\)", lambda: stkd_loss(x, x, a, a, torch.ones(3, device=DEVICE))),
        "stkd dense decoupled": (ValueError, "integer labels", lambda: stkd_loss(x, x, x, decouple=(1, 1))),
        "stkd decouple": (ValueError, "w_target", lambda: stkd_loss(x, x, a, decouple=(1,))),
        "stkd weight": (ValueError, "-1", lambda: stkd_loss(x, x, a, kd_weight=-1)),
        "sp batches": (ValueError, r"\(4, 3\) and \(2, 3, 4, 4\)", lambda: sp_loss(x, maps)),
        "sp layers": (ValueError, "2 and 1", lambda: sp_loss([x, x], [x])),
        "sp none": (ValueError, "0 and 0", lambda: sp_loss([], [])),
        "sp list and tensor": (TypeError, "list", lambda: sp_loss([x], x)),
        "sp one dimension": (ValueError, r"\(4,\)", lambda: sp_loss(x[:, 0], x[:, 0])),
        "sp row norm": (ValueError, "'max'", lambda: SPLoss(row_norm="max")),
        "sp eps": (ValueError, "eps", lambda: sp_loss(x, x, eps=0)),
        "sp mixed float64": (TypeError, "float64", lambda: sp_loss([x, x.double()], [x, x.double()])),
        "amd maps": (ValueError, r"same H and W.*\(2, 3, 4, 2\)", lambda: amd_loss(maps, maps[..., :2])),
        "amd dimensions": (ValueError, r"B, C, H, W", lambda: amd_loss(x, x)),
        "amd quadrants": (ValueError, "2 or more", lambda: amd_loss(maps[..., :1], maps[..., :1], local_weight=0.2)),
        "amd margin": (ValueError, "3", lambda: amd_loss(maps, maps, margin=3)),
        "amd weights": (ValueError, "2 numbers for 1", lambda: amd_loss(maps, maps, layer_weights=[1, 2])),
        "amd weights name": (ValueError, "'height'", lambda: amd_loss(maps, maps, layer_weights="height")),
        "amd local": (ValueError, "1.5", lambda: amd_loss(maps, maps, local_weight=1.5)),
        "stkd target list": (
            TypeError,
            "target must be a torch.Tensor, got list",
            lambda: stkd_loss(x, x, [0, 1, 2, 0]),
        ),
        "stkd target None": (TypeError, "got NoneType", lambda: stkd_loss(x, x, None)),
        "stkd lam list": (TypeError, "lam .* got list", lambda: stkd_loss(x, x, a, a, [0.5])),
        "stkd decouple number": (ValueError, "8.0", lambda: STKDLoss(decouple=8.0)),
        "stkd ignore_index": (TypeError, "ignore_index must be an int", lambda: stkd_loss(x, x, a, ignore_index=None)),
        "sp None": (TypeError, "NoneType", lambda: sp_loss(None, None)),
        "amd layer weights number": (TypeError, "got float", lambda: amd_loss(maps, maps, layer_weights=2.0)),
        "amd local None": (TypeError, "NoneType", lambda: amd_loss(maps, maps, local_weight=None)),
        "amd module margin": (ValueError, "got 5", lambda: AMDLoss(margin=5)),
        "mlkd module views": (ValueError, "views", lambda: kdkernels.MLKDLoss(4, 4, views=0)),
        "mlkd module weights": (ValueError, "correlation", lambda: kdkernels.MLKDLoss(4, 4, weights=(1,))),
        "mlkd no term": (ValueError, "leave no term", lambda: kdkernels.mlkd_loss(x, x, weights=(0, 1, 0))),
        "corsd module temperature": (ValueError, "-1", lambda: kdkernels.CORSDLoss((2, 4), 3, temperature=-1)),
        "corsd weights": (ValueError, "six numbers", lambda: kdkernels.CORSDLoss((2, 4), 3, weights=(1.0, 2.0))),
        "mixup tiny alpha": (ValueError, "0.01 or more", lambda: mixup(maps, a[:2], alpha=1e-3)),
        "mixup integers": (TypeError, "uint8", lambda: mixup(maps.byte(), a[:2])),
        "mixup batch": (ValueError, "differ in B", lambda: mixup(maps, a)),
        "mixup alpha": (ValueError, "alpha", lambda: mixup(maps, a[:2], alpha=0)),
        "cutmix dimensions": (ValueError, r"B, C, H, W", lambda: cutmix(x, a)),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_input_is_named(name: str) -> None:
    error, message, call = bad_calls()[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(DEVICE != "cpu", reason="labels on an accelerator are not read back")
def test_a_label_out_of_range_is_named() -> None:
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"target_mixed has label 7; valid are 0..2"):
        stkd_loss(x, x, torch.tensor([0, 1, 2, -100]), torch.tensor([0, 1, 7, 0]), 0.5)


def test_devices_are_named() -> None:
    with pytest.raises(ValueError, match=r"student is on .* and teacher on meta"):
        sp_loss(torch.ones(2, 3, device=DEVICE), torch.ones(2, 3, device="meta"))


def test_modules_show_their_options() -> None:
    assert "temperature=2.0" in repr(KDLoss(2.0))
    assert "row_norm='l1'" in repr(SPLoss("l1"))
    assert "decouple=(1.0, 8.0)" in repr(STKDLoss(decouple=(1.0, 8.0)))
    assert "margin=1.2" in repr(AMDLoss(1.2))


def test_every_public_name_is_documented() -> None:
    for name in kdkernels.__all__:
        if name != "__version__":
            assert getattr(kdkernels, name).__doc__, name


def test_student_close_to_its_teacher_keeps_its_digits() -> None:
    s = randn(8, 16, 6, 6, dtype=torch.float32).relu()
    t = s + 1e-3 * randn(8, 16, 6, 6, dtype=torch.float32)
    for loss in (sp_loss, amd_loss):
        exact = loss(s.double(), t.double())
        check_close("loss", loss(s, t), exact, 2e-3)


# ---- how losses are called elsewhere


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kd": kd_loss,
    "stkd": lambda s, t: stkd_loss(s, t, torch.arange(len(s), device=s.device) % 3, decouple=(1.0, 8.0)),
    "sp": sp_loss,
    "amd": lambda s, t: amd_loss(s.view(-1, 3, 2, 2), t.view(-1, 3, 2, 2), local_weight=0.2),
    "correlation": lambda s, t: kdkernels.correlation_loss(s, t, views=2),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_teacher_may_run_in_inference_mode(name: str) -> None:
    s, t = randn(4, 12, dtype=torch.float32).requires_grad_(), randn(4, 12, dtype=torch.float32)
    with torch.inference_mode():
        inference = t * 1
    torch.testing.assert_close(
        gradients(LOSSES[name](s, inference), [s])[0], gradients(LOSSES[name](s, t), [s])[0], rtol=0, atol=0
    )


@pytest.mark.parametrize("name", list(LOSSES))
def test_forward_mode_derivatives_refuse(name: str) -> None:
    s, t = randn(4, 12, dtype=torch.float32), randn(4, 12, dtype=torch.float32)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        LOSSES[name](torch.autograd.forward_ad.make_dual(s, torch.ones_like(s)), t)


@pytest.mark.parametrize("name", list(LOSSES))
def test_compiled_with_dynamic_shapes(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], dynamic=True, fullgraph=True)
    for n in (4, 6):
        s, t = randn(n, 12, dtype=torch.float32), randn(n, 12, dtype=torch.float32)
        torch.testing.assert_close(compiled(s, t), LOSSES[name](s, t))


def test_compiled_with_a_temperature_that_changes() -> None:
    torch._dynamo.reset()
    s, t = randn(4, 12, dtype=torch.float32), randn(4, 12, dtype=torch.float32)
    compiled = torch.compile(lambda temperature: kd_loss(s, t, temperature=temperature), fullgraph=True)
    for temperature in (4.0, 3.5, 2.0):
        torch.testing.assert_close(compiled(temperature), kd_loss(s, t, temperature=temperature))


def test_numpy_scalars_are_numbers() -> None:
    s, t = randn(4, 12), randn(4, 12)
    for scalar in (np.float32(2), np.float64(2), np.int64(2)):
        assert torch.equal(kd_loss(s, t, temperature=scalar), kd_loss(s, t, temperature=2.0))


def test_compiled_with_dynamic_shapes_and_a_lam_per_sample() -> None:
    student, teacher = torch.randn(6, 5, device=DEVICE), torch.randn(6, 5, device=DEVICE)
    a, b = (torch.randint(5, (6,), device=DEVICE) for _ in range(2))

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return stkd_loss(s, t, a, b, torch.full((6,), 0.4, device=DEVICE))

    torch._dynamo.reset()
    compiled = torch.compile(loss, dynamic=True, fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))
