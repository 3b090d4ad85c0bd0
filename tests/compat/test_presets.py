"""Every preset of kdkernels.compat: the original's value and gradient, return type and shape, and its quirks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import originals
import pytest
import torch
from checking import check_close, check_compiled, gradients, refused
from presets import LOGITS, MAPS, PRESETS, TWO, N, T, draw, torchdistill_kd, torchdistill_sp
from torch import Tensor

import kdkernels
from kdkernels.compat import kd_zoo, mdistiller, mlld, repdistiller, torchdistill
from kdkernels.compat.patching import bare_signature

UPSTREAM = 3.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_value_and_gradient_are_the_originals(name: str, dtype: torch.dtype, backend: str) -> None:
    ours, original, student_shapes, teacher_shapes, shape = PRESETS[name]
    student, teacher = draw(student_shapes, dtype), draw(teacher_shapes, dtype)
    if refused(lambda *x: ours(x, teacher), *student):
        return  # a backend without float64 that says so
    student = [x.requires_grad_() for x in student]
    exact_s, exact_t = [x.detach().double().requires_grad_() for x in student], [x.double() for x in teacher]
    loss, expected = ours(student, teacher), original(exact_s, exact_t)
    assert isinstance(loss, Tensor)
    assert loss.shape == shape
    assert loss.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12  # a few ulps: standardised logits have been rounded twice
    check_close("loss", loss, expected, tolerance)
    for x, e in zip(gradients(loss, student, UPSTREAM), gradients(expected, exact_s, UPSTREAM), strict=True):
        check_close("gradient", x, e, tolerance)


MODULES = "student_module_path, student_module_io, teacher_module_path, teacher_module_io"
SIGNATURES = {  # those of RepDistiller and mdistiller are held against their packages' shape in test_patch.py
    mdistiller.kd_loss: "(logits_student, logits_teacher, temperature, logit_stand=False)",
    mdistiller.dkd_loss: "(logits_student, logits_teacher, target, alpha, beta, temperature, logit_stand=False)",
    kd_zoo.SoftTarget: "(T)",
    kd_zoo.BSS: "(T)",
    kd_zoo.AT: "(p)",
    kd_zoo.CC: "(gamma, P_order)",
    kd_zoo.IRG: "(w_irg_vert, w_irg_edge, w_irg_tran)",
    kd_zoo.RKD: "(w_dist, w_angle)",
    kd_zoo.PKTCosSim.forward: "(self, feat_s, feat_t, eps=1e-06)",
    kd_zoo.FSP.forward: "(self, fm_s1, fm_s2, fm_t1, fm_t2)",
    torchdistill.KDLoss: f"({MODULES}, temperature, alpha=None, beta=None, reduction='batchmean', **kwargs)",
    torchdistill.LogitStdKDLoss: f"({MODULES}, temperature, eps=1e-07, alpha=None, beta=None, "
    "reduction='batchmean', **kwargs)",
    torchdistill.SKDInstanceLoss: f"({MODULES}, temperature=4.0, **kwargs)",
    torchdistill.PKTLoss: f"({MODULES}, eps=1e-07)",
    torchdistill.SPKDLoss: "(student_output_path, teacher_output_path, reduction, **kwargs)",
    torchdistill.RKDLoss: "(student_output_path, teacher_output_path, dist_factor, angle_factor, reduction, **kwargs)",
    torchdistill.CCKDLoss: "(student_linear_path, teacher_linear_path, kernel_config, reduction, **kwargs)",
    torchdistill.ATLoss: "(at_pairs, mode='code', **kwargs)",
    torchdistill.FSPLoss: "(fsp_pairs, **kwargs)",
    torchdistill.ChSimLoss: "(feature_pairs, **kwargs)",
}


@pytest.mark.parametrize("preset", SIGNATURES, ids=lambda preset: f"{preset.__module__}.{preset.__qualname__}")
def test_signatures_are_the_originals(preset: Callable[..., Any]) -> None:
    assert bare_signature(preset) == SIGNATURES[preset]


def test_torchdistills_kd_losses_are_kl_losses() -> None:
    for loss in (torchdistill.KDLoss, torchdistill.LogitStdKDLoss):
        assert isinstance(loss("fc", "output", "fc", "output", 4.0, reduction="sum"), torch.nn.KLDivLoss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchdistills_elements(dtype: torch.dtype) -> None:
    """reduction="none" is of elements, which no backend makes."""
    (s,), (t,) = draw(LOGITS, dtype), draw(LOGITS, dtype)
    s, exact = s.requires_grad_(), s.detach().double().requires_grad_()
    elements = torchdistill_kd({"alpha": 0, "reduction": "none"})([s], [t])
    log_s, log_t = (torch.log_softmax(z / T, 1) for z in (exact, t.double()))
    expected = log_t.exp() * (log_t - log_s)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    check_close("elements", elements, expected, tolerance)
    check_close("gradient", *(gradients(x, [y], UPSTREAM)[0] for x, y in ((elements, s), (expected, exact))), tolerance)


def test_similarity_is_a_list_of_one_number_per_pair() -> None:
    students, teachers = draw(TWO[0], torch.float32), draw(TWO[1], torch.float32)
    losses = repdistiller.Similarity()(students, teachers)
    assert isinstance(losses, list)
    assert [x.shape for x in losses] == [(1,), (1,)]
    for loss, s, t in zip(losses, students, teachers, strict=True):
        check_close("pair", loss[0], originals.sp(s.double(), t.double()) / N**2, 1e-6)
    assert len(repdistiller.Similarity()(students, teachers[:1])) == 1
    assert torch.equal(mdistiller.sp_loss(students[:1], teachers), losses[0])
    assert mdistiller.sp_loss([], []) == 0
    assert repdistiller.Similarity()([], []) == []


@pytest.mark.parametrize("norm", [1, 2])
def test_an_all_zero_student_row_gets_the_published_gradient(norm: int, backend: str) -> None:
    # not negative, as after a ReLU
    s, t = draw([(N, 4, 3, 3)], torch.float32)[0].relu(), draw([(N, 8)], torch.float32)[0]
    s[2] = 0
    s.requires_grad_()
    exact = s.detach().double().requires_grad_()
    expected = gradients(originals.sp(exact, t.double(), norm) / N**2, [exact], UPSTREAM)[0]
    assert expected[2].norm() > 1e9
    losses = [torchdistill_sp("batchmean")([s], [t])]
    if norm == 2:
        losses = [*repdistiller.Similarity()([s], [t]), mdistiller.sp_loss([s], [t]), kd_zoo.SP()(s, t)]
    for loss in losses:
        actual = gradients(loss, [s], UPSTREAM)[0]
        check_close("zero row", actual[2], expected[2], 1e-5)
    ours = kdkernels.sp_loss(s, t, row_norm=f"l{norm}")
    assert gradients(ours, [s])[0].norm() < 1


def test_rows_by_their_l1_norm_make_the_loss_about_b_times_smaller() -> None:
    s, t = (x.relu() for x in draw([(64, 32, 4, 4), (64, 64, 4, 4)], torch.float32))
    ratio = kd_zoo.SP()(s, t) / torchdistill_sp("batchmean")([s], [t])
    assert 48 < ratio < 80


@pytest.mark.parametrize("name", ["repdistiller.DistillKL on maps", "mdistiller.dkd_loss", "mdistiller.sp_loss"])
def test_presets_compile(name: str) -> None:
    ours, _, student_shapes, teacher_shapes, _ = PRESETS[name]
    teacher = draw(teacher_shapes, torch.float32)
    rest = draw(student_shapes[1:], torch.float32)
    check_compiled(lambda x: ours([x, *rest], teacher), draw(student_shapes[:1], torch.float32)[0], "aot_eager")


def test_correlation_trains_both_sides() -> None:
    s, t = (x.requires_grad_() for x in draw([(N, 5), (N, 5)], torch.float64))
    delta = [(s[i] - t[i]).abs() for i in range(N)]
    expected = sum((delta[i] * delta[i + 1]).sum() for i in range(N - 1)) / (N - 1)
    loss = repdistiller.Correlation()(s, t)
    check_close("loss", loss, expected, 1e-12)
    for actual, truth in zip(gradients(loss, [s, t]), gradients(expected, [s, t]), strict=True):
        check_close("gradient", actual, truth, 1e-12)


def test_grams_of_probabilities_by_element() -> None:
    (s,), (t,) = draw(LOGITS, torch.float64), draw(LOGITS, torch.float64)
    p_s, p_t = (torch.softmax(z / 2, 1) for z in (s, t))
    rows = (torch.einsum("ik,jk->ij", p_t, p_t) - torch.einsum("ik,jk->ij", p_s, p_s)).square() / N
    classes = (torch.einsum("nk,nl->kl", p_t, p_t) - torch.einsum("nk,nl->kl", p_s, p_s)).square() / s.shape[1]
    for loss, expected in ((mlld.bc_loss, rows), (mlld.cc_loss, classes)):
        check_close("elements", loss(s, t, 2.0, reduce=False), expected, 1e-12)
        check_close("sum", loss(s, t, 2.0), expected.sum(), 1e-12)


def test_lists_of_maps() -> None:
    maps = draw([(N, 4, 6, 6), (N, 3, 2, 2)], torch.float32)
    for zipped in (repdistiller.Attention(2), repdistiller.Attention(3), repdistiller.NSTLoss()):
        assert [x.shape for x in zipped(maps, maps)] == [(), ()]
        assert len(zipped(maps, maps[:1])) == 1
        assert zipped([], maps) == []
    assert mdistiller.at_loss([], maps, 2) == mdistiller.nst_loss(maps, []) == 0
    with pytest.raises(ValueError, match=r"as many channels, got \[\(2, 3\)\] and \[\(2, 4\)\]"):
        repdistiller.FSP([(2, 3)], [(2, 4)])


def test_only_rows_of_logits_can_be_standardised() -> None:
    (s,), (t,) = draw(MAPS, torch.float32), draw(MAPS, torch.float32)
    for kd_loss in (mdistiller.kd_loss, mlld.kd_loss):
        with pytest.raises(ValueError, match=r"logit_stand needs \(N, C\) logits, got \(6, 10, 3, 2\)"):
            kd_loss(s, t, 2.0, logit_stand=True)
    loss = torchdistill.LogitStdKDLoss("a", "output", "a", "output", 2.0)  # theirs: over the last dimension
    expected = originals.kl(originals.standardised(s.double()), originals.standardised(t.double()), 2.0).sum() / N
    check_close("maps", loss({"a": {"output": s}}, {"a": {"output": t}}), expected, 1e-6)
