"""What linear_kd computes: the arguments of its op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..softmax_kl.op import Terms


class Teacher(NamedTuple):
    """One of three: hidden states and weights; logits; or the largest k log-probabilities of every token."""

    teacher_hidden: Tensor | None = None  # (N, D')
    teacher_weight: Tensor | None = None  # (V', D')
    teacher_bias: Tensor | None = None  # (V',)
    teacher_scale: float = 1.0
    teacher_softcap: float = 0.0
    teacher_logits: Tensor | None = None  # (N, V')
    ids: Tensor | None = None  # (N, k) int64
    logprobs: Tensor | None = None  # (N, k); -inf: no entry
    rest: str = ""
    made_at: float = 1.0  # the temperature of the log-probabilities


class Options(NamedTuple):
    """How rows become a loss."""

    temperature: float = 1.0
    divergence: str = "forward"
    beta: float = 0.5
    standardize: bool = False
    reduction: str = "mean"
    ignore_index: int = -100
    smoothing: float = 0.0
    vocab_size: int = 0  # columns that exist; 0: all
    chunk: int = 0  # tokens at a time; 0: by the memory budget
    d_hidden: bool = False  # which gradients are wanted
    d_weight: bool = False
    d_bias: bool = False


class LinearKD(NamedTuple):
    """What linear_kd computes."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float  # logits = cap(scale (h W^T + b))
    softcap: float  # cap(z) = softcap tanh(z / softcap); 0: no cap
    teacher: Teacher
    target: Tensor | None  # (N,) int64
    mask: Tensor | None  # (N,) bool
    denominator: Tensor | None  # (): what "mean" divides by; without it the rows that count
    terms: Terms
    options: Options

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits and of all sums, whatever the inputs' are."""
        t = self.teacher
        others = (t.teacher_hidden, t.teacher_weight, t.teacher_logits, t.logprobs)
        return compute_dtype(self.hidden, self.weight, *(x for x in others if x is not None))

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The tensors that can have gradients, None where none is wanted."""
        return tuple(x if wanted else None for x, wanted in zip(self[:3], self.options[-3:], strict=True))
