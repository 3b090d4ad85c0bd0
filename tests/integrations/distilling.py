"""What the integrations' tests share: one small distillation on digits, trained by ``fit`` or by somebody else."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.training import Distillation, Method, data, fit, make_method
from kdkernels.training.models import small_student, small_teacher
from kdkernels.training.triplets import TripletDataset, collate_triplets

IMAGES, BATCH, EPOCHS, LR, SEED = 160, 32, 2, 0.02, 3
SPLIT = data.digits()
DATASET = TensorDataset(*(x[:IMAGES] for x in SPLIT.train.tensors))
METHODS = ["kd", "sp", "stkd", "mlkd"]


def make(method: str | Method) -> Distillation:
    torch.manual_seed(0)
    teacher, student = small_teacher(1, 10), small_student(1, 10)
    method = make_method(method) if isinstance(method, str) else method
    return Distillation(teacher if method.needs_teacher else None, student, method)


def loader(shuffle: bool = False, triplets: bool = False) -> DataLoader[Any]:
    if triplets:
        return DataLoader(TripletDataset(DATASET, DATASET.tensors[1]), BATCH, collate_fn=collate_triplets)
    return DataLoader(DATASET, BATCH, shuffle=shuffle)


def fitted(method: str, accumulate: int = 1, **options: Any) -> Distillation:
    """What kdkernels.training.fit makes of it."""
    distillation = make(method)
    fit(distillation, loader(**options), epochs=EPOCHS, lr=LR, seed=SEED, accumulate=accumulate, progress=False)
    return distillation


def check_same(actual: Distillation, expected: Distillation) -> None:
    """The student, its running statistics and the method's own heads are equal, and training has changed it."""
    actual_state, expected_state = actual.state_dict(), expected.state_dict()
    assert actual_state.keys() == expected_state.keys()
    for name, value in expected_state.items():
        torch.testing.assert_close(actual_state[name].cpu(), value.cpu(), rtol=1e-5, atol=1e-6, msg=name)
    untrained = make("alone").state_dict()
    assert not torch.equal(untrained["student.fc.weight"], expected_state["student.fc.weight"].cpu())
