"""What the examples share: scikit-learn's digits, a teacher trained on them for some seconds, an untrained student."""

from __future__ import annotations

import torch

from kdkernels.training import Distillation, fit
from kdkernels.training.data import Split, digits, loader
from kdkernels.training.models import ConvNet, small_student, small_teacher

TEACHER_EPOCHS, STUDENT_EPOCHS = 10, 20


def networks_and_data() -> tuple[ConvNet, ConvNet, Split]:
    split = digits()
    torch.manual_seed(0)
    teacher = small_teacher(split.channels, split.classes)
    fit(Distillation(None, teacher, "alone"), loader(split.train, 64, train=True), epochs=TEACHER_EPOCHS)
    return teacher, small_student(split.channels, split.classes), split
