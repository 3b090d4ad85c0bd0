"""What is invalid is refused by every loss, with a message that names it: each message once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import DEVICE

from kdkernels import (
    AMDLoss,
    CorrelationLoss,
    CORSDLoss,
    KDLoss,
    MLKDLoss,
    SPLoss,
    STKDLoss,
    SupervisedContrastiveLoss,
    alignment_loss,
    amd_loss,
    correlation_loss,
    corsd_loss,
    cutmix,
    kd_loss,
    mixup,
    mlkd_loss,
    sp_loss,
    stkd_loss,
    supervised_contrastive_loss,
)

X, Y = torch.ones(4, 3, device=DEVICE), torch.ones(4, 5, device=DEVICE)
MAPS = torch.ones(2, 3, 4, 4, device=DEVICE)
A = torch.zeros(4, dtype=torch.int64, device=DEVICE)
META = torch.ones(4, 3, device="meta")
Case = tuple[type[Exception], str, Callable[[], object]]

PAIRS: dict[str, Case] = {
    "kd shapes": (ValueError, r"kd_loss: .*one shape.*\(4, 3\) and \(4, 5\)", lambda: kd_loss(X, Y)),
    "kd one dimension": (ValueError, "two or more dimensions", lambda: kd_loss(X[0], X[0])),
    "kd class_dim": (ValueError, "class_dim 0 is not a dimension after", lambda: kd_loss(X, X, class_dim=0)),
    "kd class_dim, far": (ValueError, "class_dim 2", lambda: kd_loss(X, X, class_dim=2)),
    "kd no classes": (ValueError, "no classes", lambda: kd_loss(X[:, :0], X[:, :0])),
    "kd dtype": (TypeError, "teacher must be float16.*got torch.int64", lambda: kd_loss(X, X.long())),
    "kd not a tensor": (TypeError, "teacher must be a torch.Tensor, got list", lambda: kd_loss(X, [1.0])),
    "devices": (ValueError, "student is on .* and teacher on meta; move one", lambda: sp_loss(X, META)),
    "sp batches": (ValueError, r"same B, got \(4, 3\) and \(2, 3, 4, 4\)", lambda: sp_loss(X, MAPS)),
    "sp layers": (ValueError, "as many student as teacher layers, got 2 and 1", lambda: sp_loss([X, X], [X])),
    "sp no layers": (ValueError, "got 0 and 0", lambda: sp_loss([], [])),
    "sp list and tensor": (TypeError, "two tensors or two sequences.*got list and Tensor", lambda: sp_loss([X], X)),
    "sp None": (TypeError, "got NoneType and NoneType", lambda: sp_loss(None, None)),
    "sp one dimension": (ValueError, r"\(B, ...\).*got \(4,\)", lambda: sp_loss(X[:, 0], X[:, 0])),
    "sp layers' batches": (ValueError, r"all layers.*\(4, 3\) and \(2, 3\)", lambda: sp_loss([X, X[:2]], [X, X[:2]])),
    "sp layers' devices": (ValueError, "layers are on .* and meta", lambda: sp_loss([X, META], [X, META])),
    "sp mixed float64": (TypeError, "float64 and other layers", lambda: sp_loss([X, X.double()], [X, X.double()])),
    "amd sizes": (ValueError, r"same H and W.*\(2, 3, 4, 2\)", lambda: amd_loss(MAPS, MAPS[..., :2])),
    "amd dimensions": (ValueError, r"amd_loss: .*B, C, H, W", lambda: amd_loss(X, X)),
    "amd quadrants": (ValueError, "H and W of 2", lambda: amd_loss(MAPS[..., :1], MAPS[..., :1], local_weight=0.2)),
    "rows": (ValueError, r"same N.*\(4, 3\) and \(3, 3\)", lambda: correlation_loss(X, X[:3])),
    "widths": (ValueError, r"same width.*\(4, 3\) and \(4, 5\)", lambda: alignment_loss(X, Y)),
    "supervised widths": (
        ValueError,
        "supervised_contrastive_loss: .*width",
        lambda: SupervisedContrastiveLoss()(X, Y, A),
    ),
    "mlkd three": (ValueError, "student must be one tensor or three", lambda: mlkd_loss([X, X], X)),
    "mlkd rows": (ValueError, "mlkd_loss: student and teacher", lambda: mlkd_loss(X, X[:3], views=2)),
}


def label(**options: Any) -> Callable[[], object]:
    """stkd_loss with one argument that is wrong."""
    arguments: dict[str, Any] = {"target": A} | options
    return lambda: stkd_loss(X, X, **arguments)


LABELS: dict[str, Case] = {
    "shape": (ValueError, r"target must have shape \(4,\) .* or \(4, 3\) .*, got \(3,\)", label(target=A[:3])),
    "dtype": (TypeError, "target must be int64 class indices, got torch.int32", label(target=A.int())),
    "list": (TypeError, "target must be a torch.Tensor, got list", label(target=[0, 1, 2, 0])),
    "None": (TypeError, "got NoneType", label(target=None)),
    "device": (ValueError, "target is on meta and the logits on", label(target=A.to("meta"))),
    "lam alone": (ValueError, "go together", label(lam=0.5)),
    "mixed alone": (ValueError, "go together", label(target_mixed=A)),
    "mixed shape": (ValueError, "target_mixed must have shape", label(target_mixed=A[:2], lam=0.5)),
    "mixed dense": (ValueError, "dense target excludes", label(target_mixed=X, lam=0.5)),
    "lam range": (ValueError, r"lam must be in \[0, 1\], got 1.5", label(target_mixed=A, lam=1.5)),
    "lam list": (TypeError, "lam .* must be a number, got list", label(target_mixed=A, lam=[0.5])),
    "lam shape": (ValueError, r"\(\) or \(4,\), got torch.float32 \(3,\)", label(target_mixed=A, lam=X[0])),
    "lam integer": (ValueError, "got torch.int64", label(target_mixed=A, lam=A)),
    "lam device": (ValueError, "lam is on meta and the logits on", label(target_mixed=A, lam=META[:, 0])),
    "dense shape": (ValueError, r"logits' shape \(4, 3\), got \(4, 5\)", label(target=Y)),
    "dense decoupled": (ValueError, "integer labels, got a dense", label(target=X, decouple=(1, 1))),
    "decouple": (ValueError, r"\(w_target, w_non_target\), got \(1,\)", label(decouple=(1,))),
    "decouple number": (ValueError, "got 8.0", lambda: STKDLoss(decouple=8.0)),
    "decouple negative": (ValueError, "decouple must be zero or positive", lambda: STKDLoss(decouple=(1.0, -8.0))),
    "weight": (ValueError, "kd_weight must be zero or positive and finite, got -1", label(kd_weight=-1)),
    "ce weight": (ValueError, "ce_weight .*, got inf", lambda: STKDLoss(ce_weight=math.inf)),
    "smoothing": (ValueError, r"label_smoothing must be in \[0, 1\], got 1.5", label(label_smoothing=1.5)),
    "smoothing negative": (ValueError, "label_smoothing must be zero or", lambda: STKDLoss(label_smoothing=-0.1)),
    "ignore_index": (TypeError, "ignore_index must be an int, got NoneType", label(ignore_index=None)),
    "supervised shape": (
        ValueError,
        r"supervised_contrastive_loss: target must have shape \(4,\), got \(2,\)",
        lambda: supervised_contrastive_loss(X, X, A[:2]),
    ),
    "supervised dtype": (TypeError, "target must be int64", lambda: supervised_contrastive_loss(X, X, A.float())),
    "supervised list": (TypeError, "target must be a torch.Tensor", lambda: supervised_contrastive_loss(X, X, [0])),
    "supervised device": (
        ValueError,
        "target is on meta and the student",
        lambda: supervised_contrastive_loss(X, X, A.to("meta")),
    ),
    "mlkd": (
        ValueError,
        r"\(2,\) or \(4,\) for 4 rows of 2 views, got \(3,\)",
        lambda: mlkd_loss(X, X, A[:3], views=2),
    ),
    "mlkd list": (TypeError, "mlkd_loss: target must be", lambda: mlkd_loss(X, X, [0], views=2)),
}

OPTIONS: dict[str, Case] = {
    "temperature 0": (
        ValueError,
        "temperature must be positive and finite, got 0",
        lambda: kd_loss(X, X, temperature=0),
    ),
    "temperature nan": (ValueError, "nan", lambda: KDLoss(math.nan)),
    "temperature tensor": (TypeError, "temperature must be a number, got Tensor", lambda: KDLoss(torch.ones(()))),
    "temperature bool": (TypeError, "got bool", lambda: SupervisedContrastiveLoss(True)),
    "sp row norm": (ValueError, "row_norm must be one of 'l2', 'l1', got 'max'", lambda: SPLoss(row_norm="max")),
    "sp eps": (ValueError, "eps must be positive", lambda: sp_loss(X, X, eps=0)),
    "sp layer reduction": (
        ValueError,
        "layer_reduction must be one of 'sum', 'mean', 'none', got 'max'",
        lambda: SPLoss(layer_reduction="max"),
    ),
    "sp weights": (
        ValueError,
        "sp_loss: layer_weights has 2 numbers for 1",
        lambda: sp_loss(X, X, layer_weights=[1, 2]),
    ),
    "sp weights name": (
        ValueError,
        "must be None or one number per layer, got 'area'",
        lambda: sp_loss(X, X, layer_weights="area"),
    ),
    "sp weight": (ValueError, "layer_weights must be zero or positive", lambda: sp_loss(X, X, layer_weights=[-1])),
    "sp weight tensor": (
        TypeError,
        "layer_weights must be a number, got Tensor",
        lambda: sp_loss(X, X, layer_weights=torch.ones(1)),
    ),
    "amd margin": (ValueError, r"margin must be in \(0, 2\], got 3", lambda: amd_loss(MAPS, MAPS, margin=3)),
    "amd module margin": (ValueError, "got 5", lambda: AMDLoss(margin=5)),
    "amd sharpness": (ValueError, "sharpness must be positive", lambda: AMDLoss(sharpness=0.0)),
    "amd local": (
        ValueError,
        r"local_weight must be in \[0, 1\], got 1.5",
        lambda: amd_loss(MAPS, MAPS, local_weight=1.5),
    ),
    "amd local None": (TypeError, "local_weight must be a number, got NoneType", lambda: AMDLoss(local_weight=None)),
    "amd layer reduction": (ValueError, "layer_reduction .* got 'max'", lambda: AMDLoss(layer_reduction="max")),
    "amd weights": (ValueError, "amd_loss: layer_weights has 2", lambda: amd_loss(MAPS, MAPS, layer_weights=[1, 2])),
    "amd weights name": (
        ValueError,
        "must be None, 'area' or one number per layer, got 'height'",
        lambda: amd_loss(MAPS, MAPS, layer_weights="height"),
    ),
    "amd weights number": (
        TypeError,
        "None, 'area' or one number per layer, got 2.0",
        lambda: amd_loss(MAPS, MAPS, layer_weights=2.0),
    ),
    "views": (TypeError, "views must be an int, got float", lambda: correlation_loss(X, X, views=2.0)),
    "views of rows": (
        ValueError,
        "divide the number of rows, got 3 for 4 rows",
        lambda: correlation_loss(X, X, views=3),
    ),
    "views of a module": (ValueError, "CorrelationLoss: views must be 1 or more", lambda: CorrelationLoss(0)),
    "correlation temperature": (ValueError, "temperature", lambda: CorrelationLoss(temperature=-1.0)),
    "mlkd views": (ValueError, "MLKDLoss: views", lambda: MLKDLoss(4, 4, views=0)),
    "mlkd weight": (ValueError, "alignment_weight must be zero", lambda: MLKDLoss(4, 4, alignment_weight=-1)),
    "mlkd width": (ValueError, "student_dim must be a positive int, got 0", lambda: MLKDLoss(0, 3)),
    "mlkd temperature": (ValueError, "supervised_temperature", lambda: MLKDLoss(4, 4, supervised_temperature=0)),
    "mlkd no term": (ValueError, "leave no term", lambda: mlkd_loss(X, X, correlation_weight=0, alignment_weight=0)),
    "corsd channels": (ValueError, r"two or more positive numbers, got \(4,\)", lambda: CORSDLoss((4,), 3)),
    "corsd classes": (ValueError, "num_classes must be 2 or more, got 1", lambda: CORSDLoss((4, 8), 1)),
    "corsd temperature": (ValueError, "got -1", lambda: CORSDLoss((2, 4), 3, temperature=-1)),
    "corsd margin": (ValueError, "margin must be zero or positive", lambda: CORSDLoss((2, 4), 3, margin=-1.0)),
    "corsd weight": (ValueError, "kl_neg_weight must be", lambda: CORSDLoss((2, 4), 3, kl_neg_weight=-1.0)),
    "corsd logit relation": (
        ValueError,
        "logit_relation_weight",
        lambda: CORSDLoss((2, 4), 3, logit_relation_weight=-1),
    ),
    "mixup tiny alpha": (ValueError, "alpha must be 0.01 or more, got 0.001", lambda: mixup(MAPS, A[:2], alpha=1e-3)),
    "mixup integers": (TypeError, "floating-point to be mixed, got torch.uint8", lambda: mixup(MAPS.byte(), A[:2])),
    "mixup batch": (ValueError, r"differ in B: \(2, 3, 4, 4\) and \(4,\)", lambda: mixup(MAPS, A)),
    "mixup alpha": (ValueError, "alpha must be positive", lambda: mixup(MAPS, A[:2], alpha=0)),
    "mixup list": (TypeError, "target must be a torch.Tensor, got list", lambda: mixup(MAPS, [0, 1])),
    "cutmix dimensions": (ValueError, r"images must be \(B, C, H, W\), got \(4, 3\)", lambda: cutmix(X, A)),
    "cutmix None": (TypeError, "images must be a torch.Tensor", lambda: cutmix(None, A)),
}


def triplets(**changed: Any) -> Callable[[], object]:
    """corsd_loss of two stages and four triplets with one argument that is wrong."""
    scores, logits = torch.ones(2, 4, device=DEVICE), torch.ones(2, 4, 3, device=DEVICE)
    names = ("relations_pos", "relations_neg", "logits_pos", "logits_neg", "target", "target_neg")
    arguments: dict[str, Any] = dict(zip(names, (scores, scores, logits, logits, A, A + 1), strict=True))
    return lambda: corsd_loss(**arguments | changed)


CORSD: dict[str, Case] = {
    "logits": (ValueError, r"relations must be \(L, B\) and logits \(L, B, K\)", triplets(logits_pos=X)),
    "shapes": (ValueError, "positives and negatives must have the same", triplets(relations_neg=torch.ones(1, 4))),
    "dtype": (TypeError, "floating-point tensors, got torch.int64", triplets(relations_pos=A[None].repeat(2, 1))),
    "device": (ValueError, "tensors are on .* and meta", triplets(logits_neg=META)),
    "list": (TypeError, "relations and logits must be a torch.Tensor", triplets(logits_neg=[1.0])),
    "labels": (ValueError, r"target_neg must have shape \(4,\), got \(3,\)", triplets(target_neg=A[:3])),
    "temperature": (ValueError, "temperature must be positive", triplets(temperature=-1.0)),
    "weight": (ValueError, "corsd_loss: ce_pos_weight must be zero", triplets(ce_pos_weight=-1.0)),
}
CASES = {
    f"{group}, {name}": case
    for group, cases in {"pairs": PAIRS, "labels": LABELS, "options": OPTIONS, "corsd": CORSD}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", list(CASES))
def test_bad_input_is_named(name: str) -> None:
    error, message, call = CASES[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(DEVICE != "cpu", reason="labels on an accelerator are not read back")
def test_a_label_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"target_mixed has label 7; valid are 0..2, and -100 to ignore"):
        stkd_loss(X, X, torch.tensor([0, 1, 2, -100]), torch.tensor([0, 1, 7, 0]), 0.5)
    with pytest.raises(ValueError, match=r"target has label -1"):
        stkd_loss(X, X, A - 1)
    with pytest.raises(ValueError, match=r"target must be in 0..2, no label is ignored; got \[3, 3, 3, 3\]"):
        triplets(target=A + 3)()
