"""What losses do at the edges of their arguments: half precision, empty batches of two dtypes, labels and lam."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checking import DEVICE, HALF, gradients, rounding
from test_recompilation import CLASSES, LOSSES
from torch import Tensor

from kdkernels import correlation_loss, corsd_loss, mlkd_loss, stkd_loss


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def corsd(logits: Tensor) -> Tensor:
    relations, labels = torch.full((3, 4), 0.5, device=DEVICE), torch.arange(4, device=DEVICE)
    options = {"detach_deepest": False, "kl_pos_weight": 40.0, "ce_pos_weight": 10.0}
    return corsd_loss(relations, relations, logits, logits.detach(), labels, labels + 1, **options)


OF_SEVERAL_TERMS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "mlkd": (lambda s: mlkd_loss(s, s.detach().flip(0), torch.arange(4, device=DEVICE), views=3), (12, 9)),
    "corsd": (corsd, (3, 4, 9)),
    "correlation": (lambda s: correlation_loss(s, s.detach().flip(0), views=1), (12, 9)),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", list(OF_SEVERAL_TERMS))
def test_a_half_gradient_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    """It is that of the same numbers in float32, no element off by more than half the distance of two neighbours."""
    loss, shape = OF_SEVERAL_TERMS[name]
    half = randn(*shape).to(dtype).requires_grad_()
    wide = half.detach().float().requires_grad_()
    (actual,), (exact,) = (gradients(loss(x), [x]) for x in (half, wide))
    assert actual.dtype == dtype
    allowed = rounding(exact.double(), dtype) + 1e-6 * exact.abs().max()
    assert ((actual.double() - exact.double()).abs() <= allowed).all()


def test_mlkd_gives_its_teacher_no_gradient() -> None:
    student, teacher = randn(6, 8).requires_grad_(), randn(6, 8).requires_grad_()
    mlkd_loss(student, teacher, torch.arange(6, device=DEVICE) % 3, views=1).backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "linear_kd"])
def test_an_empty_batch_of_two_dtypes_is_float64(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = (torch.zeros(0, CLASSES, dtype=dtype, device=DEVICE) for dtype in dtypes)
    loss = LOSSES[name](student.requires_grad_(), teacher)
    assert loss.dtype == torch.float64
    assert loss.item() == 0
    assert gradients(loss, [student])[0].dtype == dtypes[0]


@pytest.mark.parametrize("label", [-100, 5])
def test_a_compiled_corsd_refuses_labels_that_are_no_classes(label: int) -> None:
    relations, logits = torch.rand(2, 4), torch.randn(2, 4, 5)
    labels = torch.tensor([0, label, 1, 2])
    compiled = torch.compile(corsd_loss, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match=rf"target has label {label}; valid are 0\.\.4$"):
        compiled(relations, relations, logits, logits, labels, labels.abs() % 5)


@pytest.mark.parametrize("bad", [-0.01, 1.01, torch.inf, torch.nan])
def test_a_lam_that_is_no_share_makes_its_row_nan(bad: float) -> None:
    student, teacher, labels = randn(4, 5).requires_grad_(), randn(4, 5), torch.arange(4, device=DEVICE)
    lam = torch.tensor([0.0, bad, 0.3, 1.0], device=DEVICE)
    rows = stkd_loss(student, teacher, labels, labels.flip(0), lam, reduction="none")
    assert rows.isnan().tolist() == [False, True, False, False]
    assert gradients(rows, [student])[0].isnan().any(1).tolist() == [False, True, False, False]
