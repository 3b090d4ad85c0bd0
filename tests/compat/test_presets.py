"""Every preset of kdkernels.compat: the original's value and gradient, return type and shape, and its quirks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import originals
import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE, check_close, check_compiled, gradients, refused
from torch import Tensor

import kdkernels
from kdkernels.compat import kd_zoo, mdistiller, repdistiller, torchdistill

UPSTREAM = 3.7
N, C, T = 6, 10, 4.0
LABELS = torch.tensor([3, 0, 9, 3, 1, 7])
ONE_HOT = F.one_hot(LABELS, C).bool()
TORCHDISTILL_KD = ("fc", "output", "head", "input", T)

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def io(path: str, kind: str, x: Tensor) -> dict[str, dict[str, Tensor]]:
    return {path: {kind: x}, "other": {}}


def torchdistill_kd(options: dict[str, Any], targets: bool = True) -> Loss:
    def loss(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
        module = torchdistill.KDLoss(*TORCHDISTILL_KD, **options)
        labels = LABELS.to(s[0].device) if targets else None
        return module(io("fc", "output", s[0]), io("head", "input", t[0]), labels, "ignored", supp_dict=None)

    return loss


def torchdistill_sp(reduction: str) -> Loss:
    module = torchdistill.SPKDLoss("layer4", teacher_output_path="stage.3", reduction=reduction, unknown=1)
    return lambda s, t: module(io("layer4", "output", s[0]), io("stage.3", "output", t[0]), None, supp_dict={})


def mixed_kd(s: Tensor, t: Tensor, alpha: float, beta: float, reduction: str = "mean") -> Tensor:
    soft = originals.kl(s, t, T).sum() / (N if reduction == "mean" else 1)
    return alpha * F.cross_entropy(s, LABELS.to(s.device), reduction=reduction) + beta * T**2 * soft


def dkd(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
    return originals.dkd(s[0], t[0], ONE_HOT.to(s[0].device), 1.0, 8.0, T)


# name: ours, the original's formula, shapes of the student's and the teacher's tensors, shape of the result
LOGITS, MAPS = [(N, C)], [(N, C, 3, 2)]
ONE = [(N, 4, 3, 3)], [(N, 5, 2, 2)]
TWO = [(N, 4, 3, 3), (N, 7)], [(N, 5, 2, 2), (N, 3, 4)]
PRESETS: dict[str, tuple[Loss, Loss, list[tuple[int, ...]], list[tuple[int, ...]], tuple[int, ...]]] = {
    "repdistiller.DistillKL": (
        lambda s, t: repdistiller.DistillKL(T)(s[0], t[0]),
        lambda s, t: originals.distill_kl(s[0], t[0], T),
        LOGITS,
        LOGITS,
        (),
    ),
    "repdistiller.DistillKL on maps": (
        lambda s, t: repdistiller.DistillKL(T)(s[0], t[0]),
        lambda s, t: originals.distill_kl(s[0], t[0], T),
        MAPS,
        MAPS,
        (),
    ),
    "repdistiller.Similarity": (
        lambda s, t: sum(repdistiller.Similarity()(s, t)),
        lambda s, t: sum(originals.sp(a, b) for a, b in zip(s, t, strict=True)).view(1) / N**2,
        *TWO,
        (1,),
    ),
    "mdistiller.kd_loss": (
        lambda s, t: mdistiller.kd_loss(s[0], t[0], T),
        lambda s, t: T**2 * originals.kl(s[0], t[0], T).mean(),
        LOGITS,
        LOGITS,
        (),
    ),
    "mdistiller.kd_loss on maps": (
        lambda s, t: mdistiller.kd_loss(s[0], t[0], temperature=T),
        lambda s, t: T**2 * originals.kl(s[0], t[0], T).mean(),
        MAPS,
        MAPS,
        (),
    ),
    "mdistiller.kd_loss, logit_stand": (
        lambda s, t: mdistiller.kd_loss(s[0], t[0], 2.0, True),
        lambda s, t: 4 * originals.kl(originals.standardised(s[0]), originals.standardised(t[0]), 2.0).mean(),
        LOGITS,
        LOGITS,
        (),
    ),
    "mdistiller.dkd_loss": (
        lambda s, t: mdistiller.dkd_loss(s[0], t[0], LABELS.to(s[0].device), 1.0, 8.0, T),
        dkd,
        LOGITS,
        LOGITS,
        (),
    ),
    "mdistiller.dkd_loss, (N, 1) labels": (
        lambda s, t: mdistiller.dkd_loss(s[0], t[0], LABELS.to(s[0].device)[:, None], 1.0, 8.0, T),
        dkd,
        LOGITS,
        LOGITS,
        (),
    ),
    "mdistiller.dkd_loss, logit_stand": (
        lambda s, t: mdistiller.dkd_loss(s[0], t[0], LABELS.to(s[0].device), 1.0, 8.0, T, True),
        lambda s, t: dkd([originals.standardised(s[0])], [originals.standardised(t[0])]),
        LOGITS,
        LOGITS,
        (),
    ),
    "mdistiller.sp_loss": (
        mdistiller.sp_loss,
        lambda s, t: sum(originals.sp(a, b) for a, b in zip(s, t, strict=True)).view(1) / N**2,
        *TWO,
        (1,),
    ),
    "kd_zoo.SoftTarget": (
        lambda s, t: kd_zoo.SoftTarget(T)(s[0], t[0]),
        lambda s, t: originals.distill_kl(s[0], t[0], T),
        LOGITS,
        LOGITS,
        (),
    ),
    "kd_zoo.SoftTarget on maps": (
        lambda s, t: kd_zoo.SoftTarget(T)(s[0], t[0]),
        lambda s, t: originals.distill_kl(s[0], t[0], T),
        MAPS,
        MAPS,
        (),
    ),
    "kd_zoo.SP": (
        lambda s, t: kd_zoo.SP()(s[0], t[0]),
        lambda s, t: originals.sp(s[0], t[0]) / N**2,
        *ONE,
        (),
    ),
    "torchdistill.KDLoss": (
        torchdistill_kd({"alpha": 0.3}),
        lambda s, t: mixed_kd(s[0], t[0], 0.3, 0.7),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, beta": (
        torchdistill_kd({"alpha": 0.3, "beta": 2.0}),
        lambda s, t: mixed_kd(s[0], t[0], 0.3, 2.0),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, sum": (
        torchdistill_kd({"alpha": 0.3, "reduction": "sum"}),
        lambda s, t: mixed_kd(s[0], t[0], 0.3, 0.7, "sum"),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, label smoothing": (
        torchdistill_kd({"alpha": 0.3, "label_smoothing": 0.1}),
        lambda s, t: (
            mixed_kd(s[0], t[0], 0.0, 0.7) + 0.3 * F.cross_entropy(s[0], LABELS.to(s[0].device), label_smoothing=0.1)
        ),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, alpha 0": (
        torchdistill_kd({"alpha": 0, "beta": 5.0}),
        lambda s, t: originals.kl(s[0], t[0], T).mean(),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, alpha None": (
        torchdistill_kd({"beta": 1}),
        lambda s, t: originals.kl(s[0], t[0], T).mean(),
        LOGITS,
        LOGITS,
        (),
    ),
    "torchdistill.KDLoss, no targets": (
        torchdistill_kd({"alpha": 0.5}, targets=False),
        lambda s, t: originals.kl(s[0], t[0], T).sum() / N,
        MAPS,
        MAPS,
        (),
    ),
    "torchdistill.KDLoss, mean": (
        torchdistill_kd({"alpha": 0, "reduction": "mean"}),
        lambda s, t: originals.kl(s[0], t[0], T).sum() / s[0].numel(),
        MAPS,
        MAPS,
        (),
    ),
    "torchdistill.KDLoss, none": (
        torchdistill_kd({"alpha": 0, "reduction": "none"}),
        lambda s, t: F.softmax(t[0] / T, 1) * (F.log_softmax(t[0] / T, 1) - F.log_softmax(s[0] / T, 1)),
        LOGITS,
        LOGITS,
        (N, C),
    ),
    "torchdistill.SPKDLoss": (
        torchdistill_sp("batchmean"),
        lambda s, t: originals.sp(s[0], t[0], norm=1) / N**2,
        *ONE,
        (),
    ),
    "torchdistill.SPKDLoss, any other reduction": (
        torchdistill_sp("mean"),
        lambda s, t: originals.sp(s[0], t[0], norm=1),
        *ONE,
        (),
    ),
}


def draw(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [(2 * torch.randn(shape)).to(DEVICE, dtype) for shape in shapes]


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
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    check_close("loss", loss, expected, tolerance)
    for x, e in zip(gradients(loss, student, UPSTREAM), gradients(expected, exact_s, UPSTREAM), strict=True):
        check_close("gradient", x, e, tolerance)


SIGNATURES = {
    repdistiller.DistillKL: "(T)",
    mdistiller.kd_loss: "(logits_student, logits_teacher, temperature, logit_stand=False)",
    mdistiller.dkd_loss: "(logits_student, logits_teacher, target, alpha, beta, temperature, logit_stand=False)",
    mdistiller.sp_loss: "(g_s, g_t)",
    kd_zoo.SoftTarget: "(T)",
    torchdistill.KDLoss: "(student_module_path, student_module_io, teacher_module_path, teacher_module_io, "
    "temperature, alpha=None, beta=None, reduction='batchmean', **kwargs)",
    torchdistill.SPKDLoss: "(student_output_path, teacher_output_path, reduction, **kwargs)",
}


@pytest.mark.parametrize("preset", SIGNATURES, ids=lambda preset: f"{preset.__module__}.{preset.__name__}")
def test_signatures_are_the_originals(preset: Callable[..., Any]) -> None:
    signature = inspect.signature(preset)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == SIGNATURES[preset]


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
    check_compiled(lambda x: ours([x, *rest], teacher), draw(student_shapes[:1], torch.float32)[0])
