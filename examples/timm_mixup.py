"""STKD with timm's mixup: ``stkd_loss`` takes its dense targets (B, C) as they are.

python examples/timm_mixup.py    (pip install timm '.[train]')
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import digits
import torch
from torch import Tensor, nn

from kdkernels import stkd_loss
from kdkernels.training.data import loader
from kdkernels.training.evaluation import evaluate

Mixup = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # timm.data.Mixup: images, labels -> images, dense target


def train(
    teacher: nn.Module, student: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], mixup: Mixup, epochs: int
) -> None:
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    teacher.eval()
    student.train()
    for _ in range(epochs):
        for images, labels in batches:
            images, target = mixup(images, labels)  # both networks see the mixed images
            with torch.no_grad():
                teacher_logits = teacher(images)
            loss = stkd_loss(student(images), teacher_logits, target, temperature=4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    try:
        from timm.data import Mixup as TimmMixup
    except ImportError as error:
        raise SystemExit(f"this example needs timm and torchvision: pip install timm ({error})") from None
    teacher, student, split = digits.networks_and_data()
    mixup = TimmMixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=split.classes)
    train(teacher, student, loader(split.train, 32, train=True), mixup, digits.STUDENT_EPOCHS)
    print(f"student {evaluate(student, loader(split.test, 500, train=False)):.1f} %")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
