"""What is particular to the Triton backend: its reasons, long rows, many layers, mixing with others, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checking import DEVICE, check_close, check_op, gradients
from torch import Tensor

import kdkernels
from kdkernels.ops import backend as backends
from kdkernels.ops.angular_margin.op import ActivationPairs, angular_margin
from kdkernels.ops.gram.op import LayerPairs, SPOptions, cosine_similarity, sp_gram
from kdkernels.ops.softmax_kl.op import Labels, Rows, Terms, softmax_kl

pytest.importorskip("triton")
ON_GPU = DEVICE != "cpu"
PROBE = torch.ones(2, 2, 2, 2, device=DEVICE)
REASONS = [reason for op in backends.OPS if (reason := backends.why_not(op, "triton", PROBE))]
runs = pytest.mark.skipif(bool(REASONS), reason="; ".join(sorted(set(REASONS))))
gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: CUDA graphs and streams")

ALL_TERMS = Terms(ce=0.1, kl=0.3, target_kl=1.0, non_target_kl=8.0)


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).relu().add(0.01).to(DEVICE, dtype)


def losses(seed: int = 0) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """A loss of each op on one student tensor."""
    torch.manual_seed(seed)
    labels = Labels(*(torch.randint(30, (12,), device=DEVICE) for _ in range(2)), torch.rand(12, device=DEVICE))
    logits, target = torch.randn(12, 30, device=DEVICE), features(12, 30)
    maps, rows = features(3, 5, 6, 7), features(8, 40)
    options = {"layer_weights": [1.0, 2.0], "local_weight": 0.2}
    return {
        "softmax_kl": (
            lambda s: softmax_kl(Rows(s, logits, labels, ALL_TERMS, 4.0)),
            torch.randn(12, 30, device=DEVICE),
        ),
        "sp_gram": (
            lambda s: sp_gram(LayerPairs([s, s * s], [rows, rows], SPOptions([10.0, 20.0], "sum"))),
            features(8, 4, 5, 5),
        ),
        "cosine": (lambda s: cosine_similarity(s, target).sum(), features(9, 30)),
        "angular_margin": (
            lambda s: angular_margin(ActivationPairs([s, s * s], [maps, maps], **options)),
            features(3, 4, 6, 7),
        ),
    }


def test_reasons() -> None:
    for op in backends.OPS:
        assert "float64" in str(backends.why_not(op, "triton", PROBE.double()))
        assert "meta" in str(backends.why_not(op, "triton", PROBE.to("meta")))
        on_cpu = backends.why_not(op, "triton", PROBE.cpu())
        assert on_cpu is None or "TRITON_INTERPRET=1" in on_cpu


def test_a_request_that_cannot_be_met_raises_with_the_reason() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    with kdkernels.use_backend("triton"):
        for call in (
            lambda: sp_gram(LayerPairs([x], [x], SPOptions([1.0]))),
            lambda: cosine_similarity(x, x),
            lambda: softmax_kl(Rows(x, x)),
            lambda: angular_margin(ActivationPairs([x[..., None, None]], [x[..., None, None]], [1.0])),
        ):
            with pytest.raises(kdkernels.BackendError, match=r"triton.*float64"):
                call()


def test_auto_computes_float64_on_the_reference() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, device=DEVICE)
    with kdkernels.use_backend("auto"):
        assert sp_gram(LayerPairs([x], [x * x], SPOptions([1.0]))).dtype == torch.float64


@runs
@pytest.mark.parametrize("forward", ["triton", "reference"])
@pytest.mark.parametrize("op", list(losses()))
def test_a_forward_of_one_backend_before_a_backward_of_another(op: str, forward: str) -> None:
    function, x = losses()[op]
    backward = {"triton": "reference", "reference": "triton"}[forward]
    results = []
    for first, second in ((forward, backward), ("reference", "reference")):
        student = x.clone().requires_grad_()
        with kdkernels.use_backend(first):
            loss = function(student)
        with kdkernels.use_backend(second):
            results.append((loss, *gradients(loss, [student], 3.0)))
    for what, actual, expected in zip(("loss", "gradient"), *results, strict=True):
        check_close(what, actual, expected, 1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("terms", ["kl", "all", "dense"])
@pytest.mark.parametrize("classes", [8193, 70000 if ON_GPU else 17000])
def test_rows_longer_than_a_chunk(classes: int, terms: str) -> None:
    student, teacher = (torch.randn(2, classes).mul(3).to(DEVICE) for _ in range(2))
    student[1, 5] = teacher[0, classes - 1] = 30.0
    student[0, 3] = teacher[0, 3] = -torch.inf
    if terms == "kl":
        check_op(lambda s, t: softmax_kl(Rows(s, t, temperature=2.0, reduction="none")), [student], constants=[teacher])
        assert softmax_kl(Rows(student, student.clone(), temperature=2.0)).item() == 0
    elif terms == "all":
        labels = [torch.tensor([classes - 1, 5], device=DEVICE), torch.tensor([17, 5], device=DEVICE)]
        lam = torch.tensor(0.3, device=DEVICE)
        check_op(
            lambda s, t, lam: softmax_kl(Rows(s, t, Labels(*labels, lam), ALL_TERMS, 4.0)),
            [student],
            constants=[teacher, lam],
        )
    else:
        y = torch.rand(2, classes, device=DEVICE) / classes
        y[0, 3] = 0
        weights = Terms(ce=0.3, kl=0.9)
        check_op(lambda s, t, y: softmax_kl(Rows(s, t, Labels(y), weights, 3.0)), [student], constants=[teacher, y])


@runs
def test_a_long_row_of_nan_and_of_infinities() -> None:
    student, teacher = (torch.randn(4, 9000).to(DEVICE) for _ in range(2))
    student[0, 8999] = torch.nan
    student[1, :] = -torch.inf
    student[2, 0] = torch.inf
    labels = Labels(torch.full((4,), 7, device=DEVICE))
    with kdkernels.use_backend("triton"):
        rows = softmax_kl(Rows(student, teacher, labels, ALL_TERMS, 4.0, "none"))
    assert rows[:3].isnan().all()
    assert rows[3].isfinite()


@runs
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_labelled_logit_that_is_not_finite_does_not_hide(bad: float) -> None:
    student, teacher = (torch.randn(3, 6).to(DEVICE) for _ in range(2))
    student[1, 2] = bad
    student.requires_grad_()
    labels = Labels(torch.tensor([0, 2, 3], device=DEVICE))
    with kdkernels.use_backend("triton"):
        rows = softmax_kl(Rows(student, teacher, labels, Terms(non_target_kl=1.0), 2.0, "none"))
        gradient = gradients(rows, [student])[0]
    assert rows.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()


@runs
def test_a_label_that_is_no_class_makes_a_row_of_nan() -> None:
    # the op itself refuses it on a CPU; on an accelerator nobody can look before the kernel does
    module = backends.load("softmax_kl", "triton")
    student, teacher = (torch.randn(3, 6).to(DEVICE) for _ in range(2))
    labels = Labels(torch.tensor([0, 6, -100], device=DEVICE))
    x = Rows(student, teacher, labels, Terms(ce=1.0), reduction="none")
    rows, stats, scale = module.forward(x, True)
    assert rows.isnan().tolist() == [False, True, False]
    gradient = module.backward(torch.ones_like(rows), x, stats, scale)
    assert gradient[1].isnan().all()
    assert (gradient[2] == 0).all()
    assert gradient[0].isfinite().all()


@runs
def test_more_layers_than_one_launch_takes() -> None:
    layers = 9
    students = [features(2, 2 + i % 3, 3, 4) for i in range(layers)]
    teachers = [features(2, 3, 3, 4) for _ in range(layers)]
    weights = [float(i) for i in range(layers)]
    options = SPOptions(weights, "sum", "none")
    with kdkernels.use_backend("triton"):
        summed = options._replace(layer_reduction="sum")
        for function in (
            lambda *x: sp_gram(LayerPairs(list(x[:layers]), list(x[layers:]), options)),
            lambda *x: sp_gram(LayerPairs(list(x[:layers]), list(x[layers:]), summed)),
            lambda *x: angular_margin(
                ActivationPairs(list(x[:layers]), list(x[layers:]), weights, False, "none", "none")
            ),
        ):
            check_op(function, students, constants=teachers, upstream=1e3)


@runs
def test_layers_of_mixed_dtypes_layouts_and_empty_maps() -> None:
    shapes = [(3, 4, 5, 5), (3, 4, 1, 1), (3, 4, 0, 5), (3, 2, 6, 4)]
    students = [features(*shape) for shape in shapes]
    students[0] = students[0].contiguous(memory_format=torch.channels_last)
    students[3] = students[3].half().transpose(2, 3)
    teachers = [s.float().flip(0) for s in students]
    results = {}
    for name in ("triton", "reference"):
        with kdkernels.use_backend(name):
            leaves = [s.detach().requires_grad_() for s in students]
            loss = angular_margin(ActivationPairs(leaves, teachers, [1.0] * 4, layer_reduction="none"))
            results[name] = [loss, *gradients(loss, leaves, 1e3)]
    assert results["triton"][1].is_contiguous(memory_format=torch.channels_last)
    for i, (actual, expected) in enumerate(zip(results["triton"], results["reference"], strict=True)):
        check_close(f"result {i}", actual, expected, 1e-5, actual.dtype if i else None)


@runs
def test_gradients_do_not_alias_and_keep_the_promised_layout() -> None:
    with kdkernels.use_backend("triton"):
        for function, x in losses().values():
            for view in (
                x,
                x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.t().contiguous().t(),
            ):
                leaf = view.detach().requires_grad_()
                gradient = gradients(function(leaf), [leaf])[0]
                assert gradient.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()
                assert gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)


@runs
def test_large_batch_has_several_tiles_and_blocks() -> None:
    rows = 300 if not ON_GPU else 2100  # more than one tile of 128 rows; on a GPU, rows of several blocks too
    student, teacher = features(rows, 33), features(rows, 20)
    with kdkernels.use_backend("triton"):
        check_op(
            lambda s, t: sp_gram(LayerPairs([s], [t], SPOptions([1.0], "sum"))),
            [student],
            constants=[teacher],
            upstream=1e3,
        )


@runs
def test_column_shards_add_up_to_the_whole() -> None:
    module = backends.load("gram", "triton")
    student, teacher = [features(7, 12), features(7, 9)], [features(7, 20), features(7, 5)]
    options = SPOptions([1.0, 3.0], layer_reduction="none")
    loss, gradient_matrix = module.sp_forward(LayerPairs(student, teacher, options), True)
    parts = [[x[:, :4] for x in (*student, *teacher)], [x[:, 4:] for x in (*student, *teacher)]]
    grams = (module.grams(parts[0]) + module.grams(parts[1])).view(2, 2, 7, 7)
    from_grams = module.sp_from_grams(grams, options, True)
    check_close("loss", from_grams[0], loss, 1e-5)
    check_close("gradient matrix", from_grams[1], gradient_matrix, 1e-4)


@runs
def test_products_and_squares() -> None:
    module = backends.load("gram", "triton")
    a, b = torch.randn(9, 50).to(DEVICE), torch.randn(50, 20).to(DEVICE).t()
    products, squares_a, squares_b = module.products(a, b)
    check_close("products", products, a.double() @ b.double().t(), 1e-6)
    check_close("squares of a", squares_a, a.double().square().sum(1), 1e-6)
    check_close("squares of b", squares_b, b.double().square().sum(1), 1e-6)


def on_another_stream(run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = run()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@gpu
@pytest.mark.parametrize("op", list(losses()))
def test_two_runs_and_another_stream_are_bitwise_equal(op: str) -> None:
    function, x = losses()[op]

    def run() -> tuple[Tensor, Tensor]:
        student = x.detach().requires_grad_()
        loss = function(student)
        return loss.detach(), gradients(loss, [student], 3.0)[0]

    with kdkernels.use_backend("triton"):
        first, second, third = run(), on_another_stream(run), run()
    for again in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@gpu
@pytest.mark.parametrize("op", list(losses()))
def test_a_captured_graph_of_forward_and_backward_equals_eager(op: str) -> None:
    function, x = losses()[op]
    student = x.detach().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = function(student)
        upstream = torch.full_like(loss, 3.0)  # filled on the device: a capture takes no copy from the host
        return loss, torch.autograd.grad(loss, student, upstream)[0]

    with kdkernels.use_backend("triton"):
        on_another_stream(run)  # kernels are compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        with torch.no_grad():
            student.mul_(0.7)
        graph.replay()
        expected = run()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
