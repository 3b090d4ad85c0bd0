"""linear_kd_loss never has half of the logits, and its precision is that of fp32 logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checking import DEVICE, check_close, wave
from functorch.compile import make_boxed_func
from test_linear_kd import STUDENT, TEACHER, TEACHERS, TOKENS, VOCABULARY, heads, sum_of
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kdkernels import Head, TopK, kd_loss, linear_kd_loss
from kdkernels.ops.linear_kd import op as linear_op
from kdkernels.ops.linear_kd import products
from kdkernels.ops.linear_kd.chunks import piece_size
from kdkernels.ops.linear_kd.columns import Columns


class Watch(TorchDispatchMode):
    """Every tensor that any operation makes passes ``see``."""

    def __init__(self, see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.see(function.name(), x)
        return out


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's two passes without the op, inside of which no mode sees anything."""
    monkeypatch.setattr(linear_op, "_op", lambda x: linear_op.linear_kd_over_ranks(x, Columns.alone(x)))


@pytest.mark.parametrize(("tokens", "rows"), [(0, 1), (1, 1), (24, 8), (25, 9), (384, 128), (385, 192), (4096, 1408)])
def test_logits_come_by_thirds_and_of_many_tokens_by_blocks_of_64(tokens: int, rows: int) -> None:
    x: Any = SimpleNamespace(hidden=torch.empty(tokens, 1))
    assert piece_size(x) == rows


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["head", *TEACHERS[2:]])
def test_no_tensor_of_half_the_logits_exists(kind: str, reduction: str) -> None:
    tokens, vocabulary = 24, 40  # more than the width of hidden states times anything
    hidden, weight, t_hidden, t_weight = (
        wave(shape, seed, 1.0).requires_grad_(seed < 3)
        for seed, shape in enumerate([(tokens, 3), (vocabulary, 3), (tokens, 5), (vocabulary, 5)], 1)
    )
    target = torch.arange(tokens, device=DEVICE)
    teacher: Any = Head(t_hidden, t_weight)
    if kind != "head":
        logprobs, ids = (t_hidden @ t_weight.T).log_softmax(-1).topk(3)
        teacher = TopK(ids, logprobs, kind)
    largest = {"elements": 0}

    def see(name: str, x: Tensor) -> None:
        largest["elements"] = max(largest["elements"], x.numel())
        assert x.numel() < tokens * vocabulary // 2, f"{name} made {tuple(x.shape)}"

    with Watch(see):
        for options in ({"divergence": "jsd"}, {"ce_weight": 0.5, "label_smoothing": 0.1, "temperature": 2.0}):
            if kind != "head" and "temperature" in options:
                teacher = teacher._replace(temperature=2.0)
            loss = linear_kd_loss(Head(hidden, weight), teacher, target, reduction=reduction, **options)
            loss.sum().backward()
    assert largest["elements"] >= vocabulary, "the logits of no token were seen"
    with pytest.raises(AssertionError, match="made"), Watch(see):
        hidden @ weight.T


def test_nor_in_a_compiled_graph() -> None:
    """What Dynamo and AOTAutograd leave of forward and backward is the op and small things around it."""
    tokens, vocabulary = 24, 40
    shapes: list[int] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found = [node.meta["val"] for node in graph.graph.nodes if "val" in node.meta]
        tensors = [x for val in found for x in (val if isinstance(val, (tuple, list)) else (val,))]
        shapes.extend(x.numel() for x in tensors if isinstance(x, Tensor))
        return make_boxed_func(graph.forward)

    student = [wave((tokens, 3), 1, 1.0).requires_grad_(), wave((vocabulary, 3), 2, 1.0).requires_grad_()]
    teacher = Head(wave((tokens, 5), 3, 1.0), wave((vocabulary, 5), 4, 1.0))
    torch._dynamo.reset()
    step = torch.compile(
        lambda h, w: linear_kd_loss(Head(h, w), teacher), backend=aot_autograd(fw_compiler=record), fullgraph=True
    )
    step(*student).backward()
    assert max(shapes) < tokens * vocabulary // 2
    assert len(shapes) > 10


def product(_: Any, a: torch.Size, b: torch.Size, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("frozen", range(3))
def test_what_is_frozen_costs_no_product(frozen: int) -> None:
    tensors = heads()
    student = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(tensors[:3])]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
        loss = linear_kd_loss(Head(*student), Head(*tensors[3:]), chunk=TOKENS)
    found = torch.autograd.grad(loss, [x for x in student if x.requires_grad])
    expected = sum_of("head", tensors, None)[1:]
    del expected[frozen]
    for a, e in zip(found, expected, strict=True):
        check_close("gradient", a, e, 1e-12)
    widths = [STUDENT, STUDENT, 0]  # of the products for each gradient; the bias is a sum
    del widths[frozen]
    assert counter.get_total_flops() == 2 * TOKENS * VOCABULARY * (STUDENT + TEACHER + sum(widths))


@pytest.mark.parametrize("kind", ["head", "logits", "bucket"])
@pytest.mark.parametrize("trained", [(True, True), (True, False)])
def test_few_tokens_of_wide_states(kind: str, trained: tuple[bool, bool]) -> None:
    """The teacher's logits are then in the memory of the weights' gradient."""
    tokens, width, vocabulary, columns = 5, 9, 11, 8
    shapes = [(tokens, width), (vocabulary, width), (tokens, 3), (vocabulary, 3)]
    hidden, weight, *teacher = (wave(shape, seed, 1.0, torch.float64) for seed, shape in enumerate(shapes, 1))
    inputs = [x.requires_grad_(wanted) for x, wanted in zip((hidden, weight), trained, strict=True)]
    leaves = [x for x in inputs if x.requires_grad]
    logits = (teacher[0] @ teacher[1].T)[:, :columns]
    logprobs, ids = logits.log_softmax(1).topk(columns - 1)
    of_kind = {"head": Head(*teacher), "logits": logits, "bucket": TopK(ids, logprobs, "bucket")}
    loss = linear_kd_loss(Head(*inputs), of_kind[kind], vocab_size=columns)  # type: ignore[arg-type]
    expected = kd_loss((hidden @ weight.T)[:, :columns], logits, temperature=1.0)
    check_close("loss", loss, expected, 1e-12)
    for _ in range(2):
        found = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
        for a, e in zip(found, torch.autograd.grad(3 * expected, leaves, retain_graph=True), strict=True):
            check_close("gradient", a, e, 1e-12)


def near(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A student, a teacher near it, and weights whose logits are of order ten."""
    generator = torch.Generator().manual_seed(0)
    hidden, noise = (torch.randn(64, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = 2 * torch.randn(500, 32, generator=generator, dtype=torch.float64)
    return tuple(x.to(DEVICE, dtype) for x in (hidden, hidden + 0.02 * noise, weight))  # type: ignore[return-value]


def exact_gradient(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    student, teacher, weight = (x.double() for x in (student, teacher, weight))
    leaf = student.detach().requires_grad_()
    return torch.autograd.grad(kd_loss(leaf @ weight.T, teacher @ weight.T, temperature=1.0), leaf)[0]


@pytest.mark.parametrize("on_tensor_cores", [False, True])
def test_a_student_near_its_teacher_keeps_its_gradient_in_bf16(
    on_tensor_cores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-precision products with fp32 results are a GPU's; here they are emulated."""
    if on_tensor_cores and DEVICE == "cpu":
        monkeypatch.setattr(products, "has_half_products", lambda h, weight, out: True)
        monkeypatch.setattr(products.torch, "mm", _with_out_dtype(torch.mm))
        monkeypatch.setattr(products.torch, "addmm", _with_out_dtype(torch.addmm))
    student, teacher, weight = near(torch.bfloat16)
    student.requires_grad_()
    weight.requires_grad_()
    expected = exact_gradient(student, teacher, weight)

    def error(loss: Tensor) -> float:
        found = torch.autograd.grad(loss, student)[0].double()
        return float((found - expected).norm() / expected.norm())

    assert error(linear_kd_loss(Head(student, weight), Head(teacher, weight.detach()), chunk=16)) < 5e-3
    monkeypatch.undo()
    # what it is for: logits that were rounded to bf16
    assert error(kd_loss(student @ weight.T, teacher @ weight.T, temperature=1.0)) > 5e-2


def _with_out_dtype(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def widened(*tensors: Tensor, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return function(*(x if out_dtype is None else x.to(out_dtype) for x in tensors), **options)

    return widened


def test_sums_over_tokens_are_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """dW of 2000 tokens in bf16: rounded once, not in every chunk. And weights are widened in slices."""
    monkeypatch.setattr(products, "SLICE", 64)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(2000, 4, generator=generator).to(DEVICE, torch.bfloat16)
    weight = torch.randn(50, 4, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    target = torch.randint(3, (2000,), generator=generator).to(DEVICE)
    loss = linear_kd_loss(Head(hidden, weight), Head(hidden, weight.detach()), target, ce_weight=1.0, chunk=8)
    exact = weight.detach().double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(hidden.double() @ exact.T, target)
    actual, expected = torch.autograd.grad(loss, weight)[0], torch.autograd.grad(truth, exact)[0]
    check_close("dW", actual, expected, 1e-5, torch.bfloat16)
