"""Distillation of language models from hidden states and output weights, without the logits.

    z_s = student.hidden student.weight^T,  z_t of the teacher;   p = softmax(z_t / T),  q = softmax(z_s / T)
    L = mean over tokens of  ce_weight CE(target, softmax(z_s)) + kd_weight T^2 D(p, q)      D: the KL, or divergence=

tokens x vocabulary logits of two networks are what a large vocabulary fills a GPU with. Here they are made for a chunk
of tokens at a time, turned into their gradient in place, and that into gradients of hidden states and weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import describe, group_of_many, meet
from .heads import Head, TopK, check_head, read_teacher
from .ops.checks import check_labels, check_number, check_reduction
from .ops.linear_kd import LinearKD, Options, linear_kd
from .ops.linear_kd.columns import Columns
from .ops.linear_kd.op import linear_kd_over_ranks
from .ops.softmax_kl import Terms
from .stkd_loss import _check_divergence, _check_options

CALLER = "linear_kd_loss"


def linear_kd_loss(
    student: Head,
    teacher: Head | TopK | Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    decouple: tuple[float, float] | None = None,
    label_smoothing: float = 0.0,
    divergence: str = "forward",
    beta: float | None = None,
    standardize: bool = False,
    scale_by_t2: bool = True,
    reduction: str = "mean",
    ignore_index: int = -100,
    mask: Tensor | None = None,
    denominator: Tensor | float | None = None,
    vocab_size: int | None = None,
    chunk: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``stkd_loss`` of the heads' logits, of which no half exists at any time.

    Args:
        student: a ``Head``. Gradients flow to its hidden, weight and bias; those that need none cost nothing.
        teacher: a ``Head``, logits (..., V), or a ``TopK``. No gradient flows to it. Its positions are the student's.
        target: int64 labels in the shape of the positions, already aligned with them (nothing is shifted here), or None
            for pure distillation. ``ce_weight`` and ``decouple`` need them.
        temperature, ce_weight, kd_weight, decouple, label_smoothing: as in ``stkd_loss``.
        divergence, beta, standardize, scale_by_t2: as in ``kd_loss``. Neither decouple nor standardize goes together
            with a TopK or ``group``, where no process has a whole row.
        reduction: "mean" over the positions that count, "sum", or "none": a value per position. "none" makes the logits
            once more in the backward pass.
        ignore_index, mask: positions with this label, or where the bool ``mask`` is False, do not count and get no
            gradient.
        denominator: what "mean" divides by in place of the number of positions that count: a number or a tensor of one
            element, as transformers' ``num_items_in_batch``. Micro-batches with one denominator add up to one batch.
        vocab_size: columns from there on exist in neither head: padded vocabularies, or two of different padding.
        chunk: tokens at a time. By default about a third of all, and as many as need 1 GB of logits; on a CPU
            64 MB, or as much as the weight takes in float32.
        group: a torch.distributed group over whose ranks the vocabulary is split, in rank order: every rank calls with
            the same hidden states and labels, and with its slice of both weights (or of the teacher's logits; a TopK is
            whole). The loss and the gradient of ``hidden`` are whole on every rank, summed over the ranks here (as
            after Megatron's ``copy_to_tensor_model_parallel_region``: do not reduce it again); weights get the gradient
            of their slice.

    Returns:
        float32 (float64 if an input is). If nothing counts, 0. Logits, whatever the inputs' dtypes, are float32 from
        the product to their gradient, sums over tokens too, and gradients are rounded once.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options; modules, quantised, sharded or partitioned
            weights, with what to pass instead. Labels and ids on an accelerator are not read back to be checked: one
            that is invalid makes its position's loss and gradient NaN. If the calls of a group's ranks differ, all
            ranks raise.

    Source: the gradient of a chunk in the forward pass is Liger-Kernel's fused linear losses' (arXiv 2410.10989).
    """
    _check_options(temperature, ce_weight, kd_weight, decouple, label_smoothing, ignore_index)
    divergence, beta = _check_divergence(divergence, beta, decouple)
    reduction = check_reduction(reduction, CALLER)
    if not isinstance(student, Head):
        raise TypeError(f"{CALLER}: student must be a Head(hidden, weight), got {type(student).__name__}")
    check_head(student, "student", CALLER)
    count = _check_counted(student, target, mask, ce_weight, label_smoothing, decouple)
    many = group_of_many(group, CALLER)
    known = read_teacher(teacher, student, temperature, divergence, CALLER)
    if (decouple is not None or standardize) and (many is not None or known.ids is not None):
        what = "group=" if many is not None else "a TopK"
        raise ValueError(f"{CALLER}: decouple and standardize need every class of a row, which {what} has not")
    kd = kd_weight * (temperature * temperature if scale_by_t2 else 1)
    needed = torch.is_grad_enabled()
    x = LinearKD(
        student.hidden.reshape(-1, student.hidden.shape[-1]),
        student.weight,
        student.bias,
        float(student.scale),
        float(student.softcap or 0),
        known,
        None if target is None else target.reshape(-1),
        None if mask is None else mask.reshape(-1),
        _denominator(denominator, reduction, student.hidden),
        Terms(ce_weight, kd) if decouple is None else Terms(ce_weight, 0.0, kd * decouple[0], kd * decouple[1]),
        Options(
            float(temperature),
            divergence,
            beta,
            bool(standardize),
            reduction,
            ignore_index,
            float(label_smoothing),
            _positive("vocab_size", vocab_size),
            _positive("chunk", chunk),
            *(needed and t is not None and t.requires_grad for t in student[:3]),
        ),
    )
    loss = linear_kd_over_ranks(x, _meet(x, many)) if many is not None else linear_kd(_with_vocabulary(x))
    return loss.view(count) if reduction == "none" else loss


def _check_counted(
    student: Head,
    target: Tensor | None,
    mask: Tensor | None,
    ce_weight: float,
    label_smoothing: float,
    decouple: tuple[float, float] | None,
) -> torch.Size:
    """The shape of the positions; labels and mask have it."""
    shape, device = student.hidden.shape[:-1], student.hidden.device
    if target is not None:
        check_labels(f"{CALLER}: target", target, shape, device)
    elif ce_weight or decouple is not None or label_smoothing:
        raise ValueError(f"{CALLER}: ce_weight, label_smoothing and decouple need a target; without one, leave them")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{CALLER}: mask must be a bool tensor, True where a position counts")
        if mask.shape != shape or mask.device != device:
            raise ValueError(
                f"{CALLER}: mask must have the positions' shape {tuple(shape)} on {device}, got {tuple(mask.shape)} "
                f"on {mask.device}"
            )
    return shape


def _positive(name: str, value: int | None) -> int:
    """The op's 0 for None."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{CALLER}: {name} must be an int or None, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{CALLER}: {name} must be 1 or more, got {value}")
    return value


def _denominator(value: Tensor | float | None, reduction: str, like: Tensor) -> Tensor | None:
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(f"{CALLER}: denominator is what reduction='mean' divides by, got reduction={reduction!r}")
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"{CALLER}: denominator must be one real number, got {value.dtype} of shape {tuple(value.shape)}"
            )
        return value.detach().to(like.device).reshape(())
    check_number(f"{CALLER}: denominator", value)
    if not 0 < value < math.inf:
        raise ValueError(f"{CALLER}: denominator must be positive and finite, got {value}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), value, dtype=dtype, device=like.device)


def _columns(x: LinearKD) -> list[int]:
    """How many columns each network has; a TopK has none of its own."""
    t = x.teacher
    of_teacher = t.teacher_weight.shape[:1] if t.teacher_weight is not None else ()
    if t.teacher_logits is not None:
        of_teacher = t.teacher_logits.shape[1:]
    return [x.weight.shape[0], *of_teacher]


def _with_vocabulary(x: LinearKD) -> LinearKD:
    columns, size = _columns(x), x.options.vocab_size
    if size and size > min(columns):
        raise ValueError(f"{CALLER}: vocab_size must be at most {min(columns)}, got {size}")
    if not size and len(set(columns)) > 1:
        raise ValueError(
            f"{CALLER}: student and teacher have vocabularies of {columns[0]} and {columns[1]}: if the first ids mean "
            "the same in both, give vocab_size="
        )
    return x


def _meet(x: LinearKD, group: dist.ProcessGroup) -> Columns:
    """This rank's columns, after all ranks have agreed on the call."""
    columns, t = _columns(x), x.teacher
    if t.teacher_logits is not None:
        t = t._replace(teacher_logits=t.teacher_logits[:, :0])  # as wide as this rank's slice
    tensors: Sequence[Any] = [x.hidden, x.weight, x.bias, *t, x.target, x.mask, x.denominator]
    kinds = ", ".join("None" if y is None else describe([y]) if isinstance(y, Tensor) else repr(y) for y in tensors)
    same = "one slice" if len(set(columns)) == 1 else f"slices of {columns} columns"
    call = f"{CALLER} of {x.hidden.shape[0]} positions, {kinds}, scale {x.scale}, softcap {x.softcap}, {same}"
    ranks = meet(group, x.weight.shape[0], f"{call}, {x.terms}, {x.options}", x.hidden.device)
    if len(set(columns)) > 1:
        raise ValueError(f"{CALLER}: on every rank student and teacher must have the same columns, got {columns}")
    begin, total = sum(ranks.sizes[: ranks.rank]), ranks.rows
    size = x.options.vocab_size or total
    if size > total or size <= total - ranks.sizes[-1]:
        raise ValueError(
            f"{CALLER}: vocab_size {size} must end in the last rank's slice: the ranks have {ranks.sizes} columns"
        )
    return Columns(begin, min(size - begin, x.weight.shape[0]), size, group)


class LinearKDLoss(nn.Module):
    """``linear_kd_loss`` with its options as a module: ``LinearKDLoss()(Head(...), Head(...), target)``."""

    def __init__(
        self,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        kd_weight: float = 1.0,
        decouple: tuple[float, float] | None = None,
        label_smoothing: float = 0.0,
        divergence: str = "forward",
        beta: float | None = None,
        standardize: bool = False,
        scale_by_t2: bool = True,
        reduction: str = "mean",
        ignore_index: int = -100,
        vocab_size: int | None = None,
        chunk: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options(temperature, ce_weight, kd_weight, decouple, label_smoothing, ignore_index)
        _check_divergence(divergence, beta, decouple)
        check_reduction(reduction, "LinearKDLoss")
        _positive("vocab_size", vocab_size)
        _positive("chunk", chunk)
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "ce_weight": ce_weight,
            "kd_weight": kd_weight,
            "decouple": decouple,
            "label_smoothing": label_smoothing,
            "divergence": divergence,
            "beta": beta,
            "standardize": standardize,
            "scale_by_t2": scale_by_t2,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "vocab_size": vocab_size,
            "chunk": chunk,
        }
        self.group = group

    def forward(
        self,
        student: Head,
        teacher: Head | TopK | Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        return linear_kd_loss(
            student, teacher, target, mask=mask, denominator=denominator, group=self.group, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
