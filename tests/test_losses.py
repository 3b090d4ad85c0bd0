"""kd_loss, stkd_loss, sp_loss and amd_loss: their scales, layers, shapes and modules, and their digits in fp16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE, HALF, by_definition, check_close, check_op, gradients
from cuda_on_cpu import library as cuda_on_cpu
from torch import Tensor

import kdkernels
from kdkernels import AMDLoss, KDLoss, SPLoss, STKDLoss, amd_loss, kd_loss, sp_loss, stkd_loss
from kdkernels.ops.softmax_kl import Rows
from kdkernels.ops.softmax_kl.definition import softmax_kl as divergence


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def labels(*shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape, device=DEVICE)


# ---- kd_loss


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_kd_is_t2_times_the_divergence_of_each_position(temperature: float) -> None:
    s, t = randn(6, 5, 9), randn(6, 5, 9)
    rows = divergence(Rows(s.view(30, 9), t.view(30, 9), temperature=temperature, reduction="none"))
    positions = temperature**2 * rows.view(6, 5)
    torch.testing.assert_close(kd_loss(s, t, temperature=temperature, reduction="none"), positions)
    torch.testing.assert_close(kd_loss(s, t, temperature=temperature), positions.mean())
    torch.testing.assert_close(kd_loss(s, t, temperature=temperature, reduction="sum"), positions.sum())
    plain = kd_loss(s, t, temperature=temperature, scale_by_t2=False)
    torch.testing.assert_close(plain, rows.mean())
    torch.testing.assert_close(KDLoss(temperature)(s, t), positions.mean())
    torch.testing.assert_close(KDLoss(temperature, scale_by_t2=False)(s, t), rows.mean())


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
    if autocast and cuda_on_cpu.requested():
        pytest.skip("the executor is slow, and autocast has no part in a kernel")
    size = 512 if cuda_on_cpu.requested() else 4096
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        big = 3 * randn(size, 1000, dtype=dtype), 3 * randn(size, 1000, dtype=dtype)
        # an upstream gradient of a loss scaler's size, or fp16 underflows by its nature
        check_op(kd_loss, big[:1], constants=big[1:], upstream=65536.0)
        maps = [randn(8, 64, 16, 16, dtype=dtype).relu() for _ in range(2)]
        check_op(amd_loss, maps[:1], constants=maps[1:], upstream=1e6)
        features = [randn(size // 64, 2048, 7, 7, dtype=dtype).relu() * 2 for _ in range(2)]
        check_op(sp_loss, features[:1], constants=features[1:], upstream=1e6)


def test_amd_gradient_in_fp32_on_ordinary_features() -> None:
    s, t = randn(64, 64, 16, 16, dtype=torch.float32).relu(), randn(64, 64, 16, 16, dtype=torch.float32).relu()
    check_op(amd_loss, [s], constants=[t])


# ---- stkd_loss


def mixed(n: int = 8, c: int = 11) -> tuple[Tensor, ...]:
    lam = torch.rand(n, dtype=torch.float64, device=DEVICE)
    return randn(n, c), randn(n, c), labels(n, classes=c), labels(n, classes=c), lam


def test_stkd_is_mixed_cross_entropy_and_kd() -> None:
    s, t, a, b, lam = mixed()
    y = lam[:, None] * F.one_hot(a, 11) + (1 - lam[:, None]) * F.one_hot(b, 11)
    expected = 0.1 * F.cross_entropy(s, y, reduction="none") + 0.9 * kd_loss(s, t, reduction="none")
    torch.testing.assert_close(stkd_loss(s, t, a, b, lam, reduction="none"), expected)
    torch.testing.assert_close(stkd_loss(s, t, a, b, lam), expected.mean())
    torch.testing.assert_close(STKDLoss()(s, t, a, b, lam), expected.mean())
    torch.testing.assert_close(stkd_loss(s, t, y), expected.mean())  # somebody else's mixup
    hard = stkd_loss(s, t, a, ce_weight=1, kd_weight=0)
    torch.testing.assert_close(hard, F.cross_entropy(s, a))
    one = stkd_loss(s, t, a, b, 0.3, ce_weight=1, kd_weight=0)
    torch.testing.assert_close(one, 0.3 * F.cross_entropy(s, a) + 0.7 * F.cross_entropy(s, b))


def test_label_smoothing_is_that_of_cross_entropy() -> None:
    s, t, a, *_ = mixed()
    a[2] = -100
    options = {"ce_weight": 0.7, "kd_weight": 0.0, "label_smoothing": 0.2}
    expected = 0.7 * F.cross_entropy(s, a, label_smoothing=0.2)
    torch.testing.assert_close(stkd_loss(s, t, a, **options), expected)
    torch.testing.assert_close(STKDLoss(**options)(s, t, a), expected)
    whole = stkd_loss(s, t, a, kd_weight=0.9, ce_weight=0.7, label_smoothing=0.2)
    torch.testing.assert_close(whole, expected + stkd_loss(s, t, a, kd_weight=0.9, ce_weight=0.0))


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
    """KL = TCKD + S_t NCKD."""
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


@pytest.mark.parametrize("label", ["hard", "mixed"])
def test_decoupled_terms_meet_the_definition(label: str) -> None:
    """compat/test_presets.py holds the same terms against DKD's published formula."""
    s, t, a, b, lam = mixed()
    extra = (b, lam) if label == "mixed" else ()
    options = {"ce_weight": 0.5, "kd_weight": 0.7, "decouple": (1.0, 8.0)}
    check_op(lambda s, t: stkd_loss(s, t, a, *extra, **options), [s], constants=[t])
    check_op(lambda s, t: STKDLoss(**options, reduction="none")(s, t, a, *extra), [s], constants=[t])


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
    t = s.clone()
    t[:, 2] = 1.0
    target = torch.ones(2, dtype=torch.int64, device=DEVICE)
    options = {"decouple": (1.0, 8.0), "temperature": 1.0}
    loss, _ = check_op(lambda s, t: stkd_loss(s, t, target, **options), [s], constants=[t])
    assert loss > 0


# ---- sp_loss, amd_loss


def test_sp_scale_and_layers() -> None:
    s, t = randn(6, 4, 3, 3), randn(6, 5, 2, 2)
    with by_definition():
        total = sp_loss(s, t, reduction="sum")
    torch.testing.assert_close(sp_loss(s, t), total / 36)
    torch.testing.assert_close(sp_loss(s, t, reduction="sum"), total)
    torch.testing.assert_close(sp_loss([s, t], [t, s]), 2 * total / 36)
    torch.testing.assert_close(SPLoss()((s,), (t,)), total / 36)


def test_amd_layers_and_quadrants() -> None:
    s = [randn(3, 4, 8, 8).relu(), randn(3, 5, 4, 4).relu()]
    t = [randn(3, 2, 8, 8).relu(), randn(3, 9, 4, 4).relu()]
    each = [amd_loss(a, b) for a, b in zip(s, t, strict=True)]
    torch.testing.assert_close(amd_loss(s, t), each[0] + each[1])
    torch.testing.assert_close(AMDLoss()(s, t), each[0] + each[1])
    both = amd_loss(s[0], t[0], local_weight=0.2)
    local = amd_loss(s[0], t[0], local_weight=1.0)
    torch.testing.assert_close(both, 0.8 * each[0] + 0.2 * local)


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


def test_student_close_to_its_teacher_keeps_its_digits() -> None:
    s = randn(8, 16, 6, 6, dtype=torch.float32).relu()
    t = s + 1e-3 * randn(8, 16, 6, 6, dtype=torch.float32)
    for loss in (sp_loss, amd_loss):
        with by_definition():
            exact = loss(s.double(), t.double())
        check_close("loss", loss(s, t), exact, 2e-3)


# ---- modules and names


def test_modules_show_their_options() -> None:
    assert "temperature=2.0" in repr(KDLoss(2.0))
    assert "row_norm='l1'" in repr(SPLoss("l1"))
    assert "layer_reduction='mean'" in repr(SPLoss(layer_reduction="mean"))
    assert "decouple=(1.0, 8.0)" in repr(STKDLoss(decouple=(1.0, 8.0)))
    assert "margin=1.2" in repr(AMDLoss(1.2))
    assert "views=3" in repr(kdkernels.CorrelationLoss(3))
    assert "reduction='sum'" in repr(kdkernels.AlignmentLoss("sum"))
    assert "temperature=0.2" in repr(kdkernels.SupervisedContrastiveLoss(0.2))
    assert "alignment_weight=3.0" in repr(kdkernels.MLKDLoss(4, 4, alignment_weight=3.0))


def test_every_public_name_is_documented() -> None:
    for name in kdkernels.__all__:
        if name != "__version__":
            assert getattr(kdkernels, name).__doc__, name
