"""MLLD: multi-level logit distillation (Jin et al., CVPR 2023), as the authors' code computes it.

q = softmax(z / T), (N, C), of a weakly (no mark) and a strongly (~) augmented view;   sum over the temperatures T of
    rho T^2 KL  +  T^2 KL~ or KL  +  rho / N |q_t q_t' - q_s q_s'|^2  +  rho' / C |q_t' q_t - q_s' q_s|^2

KL is the mean over rows of KL(q_t || q_s); the second one is of the strong view at the ``strong_temperatures`` and of
the weak one at the others. rho is the share of rows (rho' of classes) whose confidence is at most its median.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor, nn

from .distributed import of_all_rows
from .kd_loss import flatten_positions
from .ops.checks import check_positive, check_weight
from .ops.multi_level import Levels, multi_level

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)
STRONG_TEMPERATURES = (3.0, 4.0, 5.0)


def mlld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_strong: Tensor | None = None,
    teacher_strong: Tensor | None = None,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    strong_temperatures: Sequence[float] = STRONG_TEMPERATURES,
    batch_weight: float = 1.0,
    class_weight: float = 1.0,
    quantile: float = 0.5,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """KL at several temperatures, and the squared differences of the batch's and the classes' Gram matrices.

    Args:
        student_logits, teacher_logits: (N, C) logits of the weakly augmented images. float16, bfloat16, float32 or
            float64, any strides. No gradient flows to the teacher.
        student_strong, teacher_strong: (N', C) logits of the strongly augmented ones. Give both or neither; without
            them there is no second KL.
        temperatures: each T > 0.
        strong_temperatures: at which of them the second KL is of the strong view. The default is the authors' code,
            whose terms at T = 2 and 6 are of the weak view; ``temperatures`` makes all of them strong.
        batch_weight, class_weight: of the (N, N) and the (C, C) Grams; a term of weight 0 is not computed.
        quantile: in [0, 1]. A row's confidence is the teacher's largest probability at temperature 1, that of a class
            the sum of its probabilities. The code's masks only scale means: by the share of rows, or classes, up to
            this quantile (about 1/2). 1 leaves them out.
        group: a torch.distributed group whose ranks' rows are one batch; every rank gathers the logits of all.
            Gradients follow ``sp_loss``'s convention: DistributedDataParallel's average is exact.

    Returns:
        float32 (float64 if an input is). An empty batch gives 0, and so do identical networks. There is no
        ``reduction``: the terms are means over different things.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options; ranks whose calls differ.

    Source: KD_ours.py of Jin-Ying/Multi-Level-Logit-Distillation without its weight (0.9) and its cross entropies.
    """
    caller = "mlld_loss"
    levels, strong = _check_options(caller, temperatures, strong_temperatures, batch_weight, class_weight, quantile)
    _check_rows(student_logits, teacher_logits, caller)
    extra = [0.0] * len(levels)
    if (student_strong is None) != (teacher_strong is None):
        raise ValueError(f"{caller}: student_strong and teacher_strong go together: give both or neither")
    if student_strong is not None:
        extra = [float(temperature not in strong) for temperature in levels]
    grams = float(batch_weight), float(class_weight), float(quantile)

    def weak(s: Tensor, t: Tensor) -> Tensor:
        return multi_level(Levels(s, t, levels, extra, 1.0, *grams))

    def of_strong(s: Tensor, t: Tensor) -> Tensor:
        return multi_level(Levels(s, t, strong, [1.0] * len(strong)))

    call = f"mlld_loss, {levels}, {extra}, {grams}"
    loss = of_all_rows(weak, [student_logits, teacher_logits.detach()], group, call)
    if student_strong is None or teacher_strong is None or not strong:
        return loss
    _check_rows(student_strong, teacher_strong, f"{caller}: strong view")
    return loss + of_all_rows(of_strong, [student_strong, teacher_strong.detach()], group, f"{call}, strong view")


def _check_rows(student: Tensor, teacher: Tensor, caller: str) -> None:
    flatten_positions(student, teacher, -1, caller)
    if student.dim() != 2:
        raise ValueError(f"{caller}: logits must be (N, C), got {tuple(student.shape)}; flatten positions into rows")


def _check_options(
    caller: str,
    temperatures: Sequence[float],
    strong_temperatures: Sequence[float],
    batch_weight: float,
    class_weight: float,
    quantile: float,
) -> tuple[list[float], list[float]]:
    """The temperatures, and which of them are of the strong view."""
    found = []
    for name, numbers in (("temperatures", temperatures), ("strong_temperatures", strong_temperatures)):
        if isinstance(numbers, str) or not isinstance(numbers, Iterable):
            raise TypeError(f"{caller}: {name} must be a sequence of numbers, got {numbers!r}")
        found.append(list(numbers))
        for number in found[-1]:
            check_positive(caller, **{name: number})
    levels, strong = ([float(number) for number in numbers] for numbers in found)
    if not levels or not all(any(x == level for level in levels) for x in strong):
        raise ValueError(
            f"{caller}: temperatures must be one or more, with the strong_temperatures among them, "
            f"got {temperatures!r} and {strong_temperatures!r}"
        )
    check_weight(caller, batch_weight=batch_weight, class_weight=class_weight, quantile=quantile)
    if quantile > 1:
        raise ValueError(f"{caller}: quantile must be in [0, 1], got {quantile}")
    return levels, strong


class MLLDLoss(nn.Module):
    """``mlld_loss`` with its options as a module: ``MLLDLoss()(student_logits, teacher_logits)``."""

    def __init__(
        self,
        temperatures: Sequence[float] = TEMPERATURES,
        strong_temperatures: Sequence[float] = STRONG_TEMPERATURES,
        batch_weight: float = 1.0,
        class_weight: float = 1.0,
        quantile: float = 0.5,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        levels = _check_options("MLLDLoss", temperatures, strong_temperatures, batch_weight, class_weight, quantile)
        self.temperatures, self.strong_temperatures = levels
        self.batch_weight, self.class_weight, self.quantile, self.group = batch_weight, class_weight, quantile, group

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_strong: Tensor | None = None,
        teacher_strong: Tensor | None = None,
    ) -> Tensor:
        return mlld_loss(
            student_logits,
            teacher_logits,
            student_strong,
            teacher_strong,
            temperatures=self.temperatures,
            strong_temperatures=self.strong_temperatures,
            batch_weight=self.batch_weight,
            class_weight=self.class_weight,
            quantile=self.quantile,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"temperatures={self.temperatures}, strong_temperatures={self.strong_temperatures}, "
            f"batch_weight={self.batch_weight}, class_weight={self.class_weight}, quantile={self.quantile}"
        )
