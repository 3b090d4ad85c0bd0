"""Knowledge correlation of MLKD (Ding et al., arXiv 2012.00573): how every view row resembles all base rows.

Each of B images gives V views, row V b + r being view r of image b; base rows are r = 0, view rows the others.

    S[a, j] = cos(student_a, student_j), T from the teacher;   a over view rows, j over base rows
    L = mean over a of KL(softmax_j(T / tau) || softmax_j(S / tau))

    dL/dS = (softmax(S / tau) - softmax(T / tau)) / (tau (V - 1) B), and from there through the cosines
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from .distributed import correlation_over_ranks, group_of_many
from .ops.checks import check_positive, check_reduction, check_rows
from .ops.correlation import CorrelationOptions, ViewRows, correlation


def check_views(views: int, rows: int, caller: str) -> None:
    if isinstance(views, bool) or not isinstance(views, int):
        raise TypeError(f"{caller}: views must be an int, got {type(views).__name__}")
    if views < 1 or rows % views:
        raise ValueError(
            f"{caller}: views must be 1 or more and divide the number of rows, got {views} for {rows} rows"
        )


def correlation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    views: int = 4,
    temperature: float = 0.5,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """KL between teacher's and student's softmax over the cosines of every view row with all base rows.

    Args:
        student, teacher: (V B, d), row V b + r being view r of image b; the widths may differ. float16, bfloat16,
            float32 or float64, any strides. No gradient flows to the teacher.
        views: V. With V = 1 every row is compared with all the others (the diagonal is left out, which is our reading).
        temperature: tau > 0, for both; there is no factor tau^2.
        reduction: "mean" over the (V - 1) B view rows (B for V = 1), "sum", or "none": one value per view row.
        group: a torch.distributed group, in which each rank calls with its own images (any number): the batch is
            exactly the images of all ranks. The loss is the same on every rank, and after DistributedDataParallel's
            averaging the parameters' gradients are those of one process on the whole batch (``backward`` gives each
            rank R times the gradient of the whole batch's loss; see kdkernels/distributed.py). None: only this
            process's rows.

    Returns:
        float32 (float64 if an input is). B = 1 and an empty batch give 0. A row shorter than 1e-8 counts as 1e-8 long:
        the gradient of an all-zero row is about 1e8 / rows. Float16 cannot hold that: there such a row gets none.
        Memory is (V - 1) B x B numbers, where the published code takes d times that.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options. If the calls of a group's ranks differ, all
            ranks raise; a missing rank raises the group's timeout error.

    Source: arXiv 2012.00573 (knowledge correlation); the authors' ifding/DLKD.
    """
    caller = "correlation_loss"
    check_rows(student, teacher, caller, same_width=False)
    check_views(views, student.shape[0], caller)
    check_positive(temperature=temperature)
    options = CorrelationOptions(views, float(temperature), check_reduction(reduction, caller, batchmean=False))
    teacher = teacher.detach()
    if (many := group_of_many(group, caller)) is not None:
        return correlation_over_ranks(student, teacher, options, many)
    return correlation(ViewRows(student, teacher, options))


class CorrelationLoss(nn.Module):
    """``correlation_loss`` with its options as a module: ``CorrelationLoss(views=4)(student, teacher)``."""

    def __init__(
        self,
        views: int = 4,
        temperature: float = 0.5,
        reduction: str = "mean",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_views(views, 0, "CorrelationLoss")
        check_positive(temperature=temperature)
        self.views, self.temperature, self.group = views, temperature, group
        self.reduction = check_reduction(reduction, "CorrelationLoss")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return correlation_loss(
            student,
            teacher,
            views=self.views,
            temperature=self.temperature,
            reduction=self.reduction,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return f"views={self.views}, temperature={self.temperature}, reduction={self.reduction!r}"
