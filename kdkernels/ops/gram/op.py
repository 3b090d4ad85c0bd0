"""gram: the similarities inside a batch.

    sp_gram             sum over layer pairs of scale * ||G_t - G_s||_F^2,  G = Q Q^T with normalised rows
    own_gram, gram_of   K[i, j] = <q_i, q_j>,  and <a_i, b_j>
    cosine_similarity   S[i, j] = <a_i, b_j> / (|a_i| |b_j|)
    grams, products, sp_from_grams     their parts, for batches whose columns lie on several ranks

The formulas are in definition.py. Products are accumulated in fp32 (fp64 for fp64). All layers of an sp_gram call are
one op, so that a backend can run them in one launch. Only B x B matrices are saved.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..backend import choose
from ..checks import compute_dtype, grad_like
from ..library import Differentiable, build, register, schema

ROW_NORMS = ("l2", "l1")
COSINE_EPS = 1e-8  # a row that is shorter counts as that long


class SPOptions(NamedTuple):
    """How Gram matrices become a loss."""

    layer_weights: list[float]
    reduction: str = "mean"  # over the B^2 pairs of samples, or "sum"
    layer_reduction: str = "sum"  # or "mean", "none": (L,)
    row_norm: str = "l2"  # or "l1"
    eps: float = 1e-12  # a row of K with a smaller norm is divided by this
    zero_row_grad: bool = False  # an all-zero student row passes a gradient of 1 / eps through its own normalisation

    def scales(self, batch: int) -> list[float]:
        """What each layer's ||G_t - G_s||_F^2 is multiplied by. Read inside the op, where sizes are plain numbers."""
        over = max(batch, 1) ** 2 if self.reduction == "mean" else 1
        over *= len(self.layer_weights) if self.layer_reduction == "mean" else 1
        scales = []
        for weight in self.layer_weights:
            scales.append(weight / over)
        return scales

    @property
    def per_layer(self) -> bool:
        return self.layer_reduction == "none"


class LayerPairs(NamedTuple):
    """What sp_gram computes."""

    student: list[Tensor]  # (B, ...) each, any strides
    teacher: list[Tensor]  # (B, ...); constants
    options: SPOptions


class Features(NamedTuple):
    """What own_gram computes."""

    q: Tensor  # (B, ...), any strides


class RowPair(NamedTuple):
    """What gram_of and cosine_similarity compute."""

    a: Tensor  # (N, D)
    b: Tensor  # (M, D)


class Gram(Protocol):
    """What an implementation has. Q (B, D) is a (B, ...) tensor as rows; K = Q Q^T; G is K with normalised rows."""

    def supports(self, *tensors: Tensor) -> str | None:
        """None, or the reason why these tensors cannot be computed."""

    def sp_forward(self, x: LayerPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
        """The loss, () or (L,), and the gradient matrices (L, B, B): dloss_l/dQ_s = gradient_matrix_l Q_s."""

    def sp_from_grams(self, grams: Tensor, options: SPOptions, need_grad: bool) -> tuple[Tensor, Tensor]:
        """sp_forward from (2, L, B, B): the students' K, then the teachers'."""

    def sp_backward(self, grad: Tensor, student: list[Tensor], gradient_matrix: Tensor) -> list[Tensor]:
        """grad_l * gradient_matrix_l Q_s, in the layer's shape, dtype and memory format; grad is () or (L,)."""

    def grams(self, features: list[Tensor]) -> Tensor:
        """(M, B, B): K of each of M (B, ...) tensors."""

    def products(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A B^T (N, M) and the squared norms of A's (N,) and B's (M,) rows."""

    def cosine_forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cosines (N, M) of the rows of a (N, D) and b (M, D), and the rows' inverse norms (N,) and (M,)."""

    def cosine_backward(
        self, grad: Tensor, a: Tensor, b: Tensor, similarity: Tensor, inverse_a: Tensor, inverse_b: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dloss/da and dloss/db. Columns may be any part of a's and b's: a row's gradient needs no other columns."""


def _sp_outputs(like: Tensor, batch: int, options: SPOptions, need_grad: bool) -> tuple[Tensor, Tensor]:
    layers = len(options.layer_weights)
    loss = like.new_empty((layers,) if options.per_layer else ())
    return loss, like.new_empty((layers, batch, batch) if need_grad else (0,))


def _sp_forward(*args: Any) -> tuple[Tensor, Tensor]:
    x = build(LayerPairs, args)
    implementation: Gram = choose("gram", *x.student, *x.teacher)
    return implementation.sp_forward(x, args[-1])


def _sp_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x = build(LayerPairs, args)
    like = x.student[0].new_empty((), dtype=compute_dtype(*x.student, *x.teacher))
    return _sp_outputs(like, x.student[0].shape[0], x.options, args[-1])


def _sp_backward(grad: Tensor, gradient_matrix: Tensor, student: list[Tensor]) -> list[Tensor]:
    implementation: Gram = choose("gram", *student, gradient_matrix)
    return implementation.sp_backward(grad, student, gradient_matrix)


sp_backward_op = register(
    "sp_gram_backward",
    "(Tensor grad, Tensor gradient_matrix, Tensor[] student) -> Tensor[]",
    _sp_backward,
    lambda grad, gradient_matrix, student: [grad_like(s) for s in student],
)


_sp_op = Differentiable(
    "sp_gram",
    LayerPairs,
    "Tensor loss, Tensor gradient_matrix",
    _sp_forward,
    _sp_fake,
    keep=itemgetter(slice(0, 1)),
    backward=sp_backward_op,
)


def sp_gram(x: LayerPairs) -> Tensor:
    """The layers' ||G_t - G_s||_F^2 times their scales: float32 (float64 if an input is); gradients to the student.

    Arguments are the caller's to check: sp_loss.py does.
    """
    return _sp_op(x)


def _sp_from_grams(grams: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    implementation: Gram = choose("gram", grams)
    return implementation.sp_from_grams(grams, SPOptions(*args[:-1]), args[-1])


def _sp_from_grams_fake(grams: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _sp_outputs(grams, grams.shape[-1], SPOptions(*args[:-1]), args[-1])


sp_from_grams_op = register(
    "sp_from_grams",
    f"(Tensor grams, {schema(SPOptions)}, bool need_grad) -> (Tensor loss, Tensor gradient_matrix)",
    _sp_from_grams,
    _sp_from_grams_fake,
)
grams_op = register(
    "grams",
    "(Tensor[] features) -> Tensor",
    lambda features: choose("gram", *features).grams(features),
    lambda features: features[0].new_empty(
        (len(features), len(features[0]), len(features[0])), dtype=compute_dtype(*features)
    ),
)


def _cosine_fake(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, n, m = compute_dtype(a, b), a.shape[0], b.shape[0]
    return a.new_empty((n, m), dtype=dtype), a.new_empty(n, dtype=dtype), a.new_empty(m, dtype=dtype)


products_op = register(
    "products",
    "(Tensor a, Tensor b) -> (Tensor products, Tensor squares_a, Tensor squares_b)",
    lambda a, b: choose("gram", a, b).products(a, b),
    _cosine_fake,
)
cosine_backward_op = register(
    "cosine_similarity_backward",
    "(Tensor grad, Tensor similarity, Tensor inverse_a, Tensor inverse_b, Tensor a, Tensor b) -> (Tensor, Tensor)",
    lambda grad, s, inverse_a, inverse_b, a, b: choose("gram", a, b).cosine_backward(
        grad, a, b, s, inverse_a, inverse_b
    ),
    lambda grad, s, inverse_a, inverse_b, a, b: (a.new_empty(a.shape), b.new_empty(b.shape)),
)


_cosine_op = Differentiable(
    "cosine_similarity",
    RowPair,
    "Tensor similarity, Tensor inverse_a, Tensor inverse_b",
    lambda a, b, need_grad: choose("gram", a, b).cosine_forward(a, b),
    lambda a, b, need_grad: _cosine_fake(a, b),
    keep=itemgetter(slice(0, 2)),
    backward=cosine_backward_op,
    inputs=2,
    keeps_loss=True,
)


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) cosines of the rows of a (N, D) and b (M, D); gradients flow to both. A zero row has cosine 0.

    Arguments are the caller's to check.
    """
    return _cosine_op(RowPair(a, b))


def _own_backward(grad: Tensor, q: Tensor) -> Tensor:
    """(G + G^T) Q, which is SP's backward pass."""
    implementation: Gram = choose("gram", q, grad)
    matrix = (grad + grad.t()).contiguous()
    return implementation.sp_backward(grad.new_ones(()), [q], matrix[None])[0]


def _pair_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """G B and G^T A: what cosines' backward pass does to rows of length 1 that it takes nothing from."""
    implementation: Gram = choose("gram", a, b)
    one = grad.new_ones(())
    inverse_a, inverse_b = one.expand(a.shape[0]).contiguous(), one.expand(b.shape[0]).contiguous()
    return implementation.cosine_backward(grad, a, b, grad.new_zeros(grad.shape), inverse_a, inverse_b)


_own_op = Differentiable(
    "own_gram",
    Features,
    "Tensor gram",
    lambda q, need_grad: choose("gram", q).grams([q])[0],
    lambda q, need_grad: q.new_empty((q.shape[0], q.shape[0]), dtype=compute_dtype(q)),
    keep=itemgetter(slice(0, 1)),
    backward=register(
        "own_gram_backward", "(Tensor grad, Tensor q) -> Tensor", _own_backward, lambda grad, q: grad_like(q)
    ),
)
_pair_op = Differentiable(
    "gram_of",
    RowPair,
    "Tensor gram",
    lambda a, b, need_grad: choose("gram", a, b).products(a, b)[0],
    lambda a, b, need_grad: _cosine_fake(a, b)[0],
    keep=itemgetter(slice(0, 2)),
    backward=register(
        "gram_of_backward",
        "(Tensor grad, Tensor a, Tensor b) -> (Tensor, Tensor)",
        _pair_backward,
        lambda grad, a, b: (a.new_empty(a.shape), b.new_empty(b.shape)),
    ),
    inputs=2,
)


def own_gram(q: Tensor) -> Tensor:
    """(B, B) products of the rows of q (B, ...), with gradient. Arguments are the caller's to check."""
    return _own_op(Features(q))


def gram_of(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) products of the rows of a (N, D) and b (M, D); gradients flow to both.

    Arguments are the caller's to check.
    """
    return _pair_op(RowPair(a, b))
