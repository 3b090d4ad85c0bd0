"""MLKD: Multi-level Knowledge Distillation via Knowledge Alignment and Correlation (Ding et al., arXiv 2012.00573;
TNNLS 35(2), 2024, as "DLKD"). Not "Multi-Level Logit Distillation" (CVPR 2023), which other libraries also call MLKD.

Each of B images gives V views, row V b + r being view r of image b; base rows are r = 0, view rows the others.

    alignment     2 - 2 mean over all rows of cos(g_a(f_s), f_t)
    correlation   S[a, j] = cos(u_a, u_j), u = g_c(f_s), and T from f_t;   a over view rows, j over base rows
                  mean over a of KL(softmax_j(T / tau) || softmax_j(S / tau))
    supervised    over the rows of e_s(f_s) and e_t(f_t) together: see supervised_contrastive_loss.py
    L             alpha correlation + beta supervised + delta alignment          beside the task's cross entropy

    dL_corr/dS = (softmax(S / tau) - softmax(T / tau)) / (tau (V - 1) B), and from there through the cosines
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import cosine_over_ranks, describe, group_of_many, meet, replicate, shard_rows
from .ops.checks import check_positive, check_rows, check_tensor, check_weight, compute_dtype
from .ops.correlation import correlation, view_rows
from .ops.gram import cosine_similarity
from .ops.softmax_kl import softmax_kl
from .supervised_contrastive_loss import supervised_contrastive_loss

WEIGHTS = (50.0, 1.0, 20.0)  # alpha, beta, delta of the authors' CIFAR-100 recipe


def _check_views(views: int, rows: int, what: str) -> None:
    if isinstance(views, bool) or not isinstance(views, int):
        raise TypeError(f"{what}: views must be an int, got {type(views).__name__}")
    if views < 1 or rows % views:
        raise ValueError(f"{what}: views must be 1 or more and divide the number of rows, got {views} for {rows} rows")


def alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """2 - 2 * mean over rows of cos(student, teacher).

    Args:
        student: (N, d), already projected to the teacher's width. float16, bfloat16, float32 or float64, any strides.
        teacher: (N, d). No gradient flows to it.

    Returns:
        A float32 scalar (float64 if an input is), between 0 and 4. A row shorter than 1e-8 counts as that long; an
        empty batch gives 0.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that cannot be meant, with both shapes.

    Source: arXiv 2012.00573 (knowledge alignment); the authors' ifding/DLKD.
    """
    check_rows(student, teacher, "alignment_loss", same_width=True)
    dtype = compute_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    cosines = torch.nn.functional.cosine_similarity(student, teacher, dim=1)
    return (2 - 2 * cosines).sum() / max(student.shape[0], 1)


def correlation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    views: int = 4,
    temperature: float = 0.5,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """KL between teacher's and student's softmax over the cosines of every view row with all base rows.

    Args:
        student, teacher: (V B, d), row V b + r being view r of image b; the widths may differ. float16, bfloat16,
            float32 or float64, any strides. No gradient flows to the teacher.
        views: V. With V = 1 every row is compared with all the others (our reading: the diagonal is left out).
        temperature: tau > 0, for both; there is no factor tau^2.
        group: a torch.distributed group, each rank of which calls with its own images (any number of them): the batch
            is the images of all ranks, exactly. The loss is the same number on every rank, and after
            DistributedDataParallel's averaging the parameters' gradients are those of one process on the whole batch
            (``backward`` hands each rank R times the gradient of the whole batch's loss; see kdkernels/distributed.py).
            None: this process's rows alone.

    Returns:
        A float32 scalar (float64 if an input is), the mean over (V - 1) B rows. B = 1 and an empty batch give 0. A
        row shorter than 1e-8 counts as that long. Memory is (V - 1) B x B numbers, where the published code takes d
        times that.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that cannot be meant. Calls that differ over the ranks
            of a group raise on all of them; a missing rank raises the group's timeout error.

    Source: arXiv 2012.00573 (knowledge correlation); the authors' ifding/DLKD.
    """
    what = "correlation_loss"
    check_rows(student, teacher, what, same_width=False)
    _check_views(views, student.shape[0], what)
    check_positive("temperature", temperature)
    teacher = teacher.detach()
    many = group_of_many(group, what)
    if many is None and views > 1 and student.shape[0]:
        return correlation(student, teacher, views=views, temperature=temperature)
    if many is None:
        return _correlation(student, teacher, views, temperature, cosine_similarity)
    pair = f"student {describe([student])}, teacher {describe([teacher])}"
    ranks = meet(many, student.shape[0], f"{what} of {pair}, {views=}, {temperature=}", student.device)
    cosine = partial(cosine_over_ranks, ranks=ranks)
    loss = _correlation(shard_rows(student, ranks), shard_rows(teacher, ranks), views, temperature, cosine)
    return replicate(loss, ranks)


Cosine = Callable[[Tensor, Tensor], Tensor]


def _correlation(student: Tensor, teacher: Tensor, views: int, temperature: float, cosine: Cosine) -> Tensor:
    s, t = (_similarities(x, views, cosine) for x in (student, teacher))
    if s.shape[1] == 0:  # nothing to compare with
        return s.sum() + 0 * student.to(s.dtype).sum()
    return softmax_kl(s, t, temperature=temperature, kl_weight=1.0)


def _similarities(x: Tensor, views: int, cosine: Cosine) -> Tensor:
    """(V - 1) B view rows against B base rows; for one view the B x (B - 1) off-diagonal entries."""
    if views == 1:
        b = x.shape[0]
        # read from its second element on in rows of B + 1, a B x B matrix has its diagonal in the last column
        return (
            cosine(x, x).view(-1)[1:].view(-1, b + 1)[:, :-1].reshape(b, b - 1)
            if b > 1
            else x.new_zeros(b, 0, dtype=compute_dtype(x))
        )
    return cosine(*view_rows(x, views))


Rows = Tensor | Sequence[Tensor]


def mlkd_loss(
    student: Rows,
    teacher: Rows,
    target: Tensor | None = None,
    *,
    views: int = 4,
    weights: tuple[float, float, float] = WEIGHTS,
    temperature: float = 0.5,
    supervised_temperature: float = 0.07,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """alpha * correlation + beta * supervised + delta * alignment on projected features.

    Args:
        student, teacher: (V B, d) features that serve all three terms, or three tensors each, for the alignment, the
            correlation and the supervised term in this order. ``MLKDLoss`` owns the projections and calls this.
        target: int64 labels, (B,) one per image or (V B,) one per row. None: label-free, beta counts as 0 (our reading
            of a self-supervised teacher; leave out the task's cross entropy as well).
        views: V, see ``correlation_loss``.
        weights: (alpha, beta, delta): (50, 1, 20) for CIFAR-100, (20, 0.5, 10) for ImageNet. A term of weight 0 is not
            computed. The task's cross entropy on the base rows is the trainer's, with weight 1.
        temperature, supervised_temperature: of the correlation and of the supervised term.
        group: the correlation and the supervised term are of the whole group's batch, see ``correlation_loss``. The
            alignment is a mean over this rank's rows, like a cross entropy, so that it differs between ranks.

    Returns:
        A float32 scalar (float64 if an input is).

    Raises:
        TypeError, ValueError: what the three terms raise, and options that cannot be meant.

    Source: arXiv 2012.00573, with the weights of the authors' ifding/DLKD. There is no logit term.
    """
    _check_weights(weights)
    students, teachers = _three(student, "student"), _three(teacher, "teacher")
    alpha, beta, delta = weights
    check_rows(students[1], teachers[1], "mlkd_loss", same_width=False)
    _check_views(views, students[1].shape[0], "mlkd_loss")
    loss = torch.zeros((), dtype=compute_dtype(*students, *teachers), device=students[1].device)
    if alpha:
        loss = loss + alpha * correlation_loss(
            students[1], teachers[1], views=views, temperature=temperature, group=group
        )
    if target is None and not alpha and not delta:
        raise ValueError(f"mlkd_loss: without a target, weights {tuple(weights)} leave no term")
    if beta and target is not None:
        check_tensor("mlkd_loss: target", target)
        rows = students[2].shape[0]
        if target.shape == (rows // views,):
            target = target.repeat_interleave(views)
        elif target.shape != (rows,):
            raise ValueError(
                f"mlkd_loss: target must have shape ({rows // views},) or ({rows},) for {rows} rows of {views} views, "
                f"got {tuple(target.shape)}"
            )
        loss = loss + beta * supervised_contrastive_loss(
            students[2], teachers[2], target, temperature=supervised_temperature, group=group
        )
    if delta:
        loss = loss + delta * alignment_loss(students[0], teachers[0])
    return loss


def _check_weights(weights: Sequence[float]) -> None:
    if len(weights) != 3:
        raise ValueError(f"mlkd_loss: weights must be (correlation, supervised, alignment), got {weights!r}")
    for name, weight in zip(("correlation", "supervised", "alignment"), weights, strict=True):
        check_weight(f"mlkd_loss: {name} weight", weight)


def _three(rows: Rows, name: str) -> list[Tensor]:
    three = [rows] * 3 if isinstance(rows, Tensor) else list(rows)
    if len(three) != 3:
        raise ValueError(f"mlkd_loss: {name} must be one tensor or three (alignment, correlation, supervised)")
    return three


def _head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class MLKDLoss(nn.Module):
    """``mlkd_loss`` with its four heads: ``MLKDLoss(128, 512)(student_features, teacher_features, target)``.

        g_a   Linear(d_s, 16 d_t) - BN - ReLU - Linear(16 d_t, d_t)       alignment
        g_c   Linear(d_s, d_s) - BN - ReLU - Linear(d_s, d_s)             correlation
        e_s, e_t   Linear(d_s, 128), Linear(d_t, 128)                     supervised

    Their parameters train with the student: give ``loss.parameters()`` to the optimizer, and in data-parallel training
    wrap this module as the student is wrapped. They are dropped afterwards. With ``weights[1] == 0`` there are no e_s
    and e_t; in label-free training choose that, as their parameters stay unused.

    Args:
        student_dim, teacher_dim: d_s and d_t, the widths of the features.
        embedding_dim: the width of e_s and e_t.
        views, weights, temperature, supervised_temperature, group: ``mlkd_loss``'s.

    Source: arXiv 2012.00573; ifding/DLKD.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        embedding_dim: int = 128,
        views: int = 4,
        weights: tuple[float, float, float] = WEIGHTS,
        temperature: float = 0.5,
        supervised_temperature: float = 0.07,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("student_dim", student_dim),
            ("teacher_dim", teacher_dim),
            ("embedding_dim", embedding_dim),
        ):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"MLKDLoss: {name} must be a positive int, got {size!r}")
        check_positive("temperature", temperature)
        check_positive("supervised_temperature", supervised_temperature)
        _check_weights(weights)
        _check_views(views, 0, "MLKDLoss")
        self.views, self.weights, self.group = views, weights, group
        self.temperature, self.supervised_temperature = temperature, supervised_temperature
        self.g_a = _head(student_dim, 16 * teacher_dim, teacher_dim)
        self.g_c = _head(student_dim, student_dim, student_dim)
        self.e_s = nn.Linear(student_dim, embedding_dim) if weights[1] else None
        self.e_t = nn.Linear(teacher_dim, embedding_dim) if weights[1] else None

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of pooled penultimate features.

        Args:
            student, teacher: (V B, d_s) and (V B, d_t), row V b + r being view r of image b; no gradient
                flows to the teacher.
            target: int64 labels, (B,) or (V B,), or None.
        """
        teacher = teacher.detach()
        students, teachers = [self.g_a(student), self.g_c(student), student], [teacher, teacher, teacher]
        if self.e_s is not None and self.e_t is not None and target is not None:
            students[2], teachers[2] = self.e_s(student), self.e_t(teacher)
        return mlkd_loss(
            students,
            teachers,
            target if self.e_s is not None else None,
            views=self.views,
            weights=self.weights,
            temperature=self.temperature,
            supervised_temperature=self.supervised_temperature,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return f"views={self.views}, weights={self.weights}, temperature={self.temperature}"
