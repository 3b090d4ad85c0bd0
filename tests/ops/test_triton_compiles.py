"""Every Triton kernel goes through the compiler and ptxas for sm_90, in every combination that launches make of it.

Interpretation proves nothing about that. No GPU is needed: the launches stop after compiling. The host code that
chooses dtypes, block sizes and constants is the real one, so what is compiled here is what runs there.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
if not (TOOLS / "ptxas").exists():
    pytest.skip(f"this Triton has no ptxas in {TOOLS}", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402

from kdkernels.ops.angular_margin import triton_kernels as angular_margin  # noqa: E402
from kdkernels.ops.angular_margin.op import ActivationPairs  # noqa: E402
from kdkernels.ops.energy import triton_kernels as energy  # noqa: E402
from kdkernels.ops.energy.op import AttentionPairs  # noqa: E402
from kdkernels.ops.gram import triton_cosine  # noqa: E402
from kdkernels.ops.gram import triton_kernels as gram  # noqa: E402
from kdkernels.ops.gram.op import LayerPairs, SPOptions  # noqa: E402
from kdkernels.ops.softmax_kl import triton_kernels as softmax_kl  # noqa: E402
from kdkernels.ops.softmax_kl.op import Labels, Rows, Terms  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF = torch.bfloat16


def precision(*tensors: Tensor) -> str:
    return "tf32x3" if any(x.dtype == torch.float32 for x in tensors) else "ieee"


class Hopper:
    """A driver that knows its target and nothing else."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # a device of its own: what is compiled for it must not be taken for a real one's

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """The kernels that the host code launches, compiled instead."""
    kernels: list[tuple[str, Any]] = []

    def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
        if programs:
            kernels.append((kernel.__name__, kernel.warmup(*args, grid=(programs,), **options)))

    for module in (angular_margin, energy, gram, triton_cosine, softmax_kl):
        monkeypatch.setattr(module, "launch", launch)
    for module in (gram, triton_cosine):
        monkeypatch.setattr(module, "split_precision", lambda x: "tf32x3")
        monkeypatch.setattr(module, "matmul_precision", precision)
    monkeypatch.setattr(gram, "processors", lambda device: 132)
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(Hopper())
    yield kernels
    vars(triton.runtime.driver).update(before)


def check(kernels: list[tuple[str, Any]], expected: set[str], directory: Path) -> None:
    """The expected kernels were compiled, and none spills more than ptxas does to round a register count down."""
    assert {name for name, _ in kernels} == expected
    for i, (name, kernel) in enumerate(kernels):
        cubin = directory / f"{i}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        print(
            f"{name}: {used['REG']} registers, {kernel.metadata.shared} bytes shared, {kernel.metadata.num_warps} warps"
        )
        assert used["STACK"] <= 32, f"{name} spills: {usage}"
        assert used["LOCAL"] == 0, f"{name} spills: {usage}"


LABELS: dict[str, Callable[[int, int], Labels]] = {
    "none": lambda n, c: Labels(),
    "one": lambda n, c: Labels(torch.zeros(n, dtype=torch.int64)),
    "mixed": lambda n, c: Labels(torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64), torch.rand(n)),
    "dense": lambda n, c: Labels(torch.rand(n, c)),
}
TERMS = {
    "kd": (Terms(kl=1.0), "none"),
    "ce": (Terms(ce=1.0), "mixed"),
    "stkd": (Terms(ce=1.0, kl=1.0), "mixed"),
    "decoupled": (Terms(ce=1.0, target_kl=1.0, non_target_kl=8.0), "one"),
    "all": (Terms(1.0, 1.0, 1.0, 8.0), "mixed"),
    "dense": (Terms(ce=1.0, kl=1.0), "dense"),
}


def run_softmax_kl(student: Tensor, teacher: Tensor, terms: str, reduction: str, *options: Any) -> None:
    weights, kind = TERMS[terms]
    x = Rows(student, teacher, LABELS[kind](*student.shape), weights, 4.0, reduction, *options)
    loss, stats, scale = softmax_kl.forward(x, True)
    softmax_kl.backward(torch.ones_like(loss), x, stats, scale)


@pytest.mark.parametrize("shape", [(64, 100), (4, 1000), (2, 8000), (2, 40000)], ids=str)
@pytest.mark.parametrize("terms", list(TERMS))
def test_softmax_kl(terms: str, shape: tuple[int, int], compiled: list[Any], tmp_path: Path) -> None:
    student, teacher = torch.zeros(shape, dtype=HALF), torch.zeros(shape, dtype=HALF)
    run_softmax_kl(student, teacher, terms, "mean")
    check(
        compiled,
        {"rows_kernel", "sum_kernel", "gradient_kernel"} - ({"sum_kernel"} if shape[0] == 1 else set()),
        tmp_path,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_kl_dtypes_layouts_and_reductions(dtype: torch.dtype, compiled: list[Any], tmp_path: Path) -> None:
    teacher = torch.zeros(64, 100)
    run_softmax_kl(torch.zeros(64, 100, dtype=dtype), teacher, "all", "none")
    run_softmax_kl(torch.zeros(100, 64, dtype=dtype).t(), teacher, "stkd", "sum")
    run_softmax_kl(torch.zeros(1, 2, dtype=dtype), torch.zeros(1, 2), "all", "mean")
    run_softmax_kl(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1), "all", "mean")
    check(compiled, {"rows_kernel", "sum_kernel", "gradient_kernel"}, tmp_path)


@pytest.mark.parametrize("shape", [(64, 100), (2, 8000), (2, 40000)], ids=str)
@pytest.mark.parametrize(
    ("terms", "options"),
    [
        ("kd", ("reverse", 0.5, False)),
        ("stkd", ("jsd", 0.5, False)),
        ("kd", ("skew", 0.1, True)),
        ("stkd", ("skew_reverse", 0.1, True)),
        ("all", ("forward", 0.5, True)),
    ],
    ids=str,
)
def test_divergences_and_standardised_logits(
    terms: str, options: tuple[str, float, bool], shape: tuple[int, int], compiled: list[Any], tmp_path: Path
) -> None:
    run_softmax_kl(torch.zeros(shape, dtype=HALF), torch.zeros(shape, dtype=HALF), terms, "mean", *options)
    check(compiled, {"rows_kernel", "sum_kernel", "gradient_kernel"}, tmp_path)


def run_sp(student: list[Tensor], teacher: list[Tensor], row_norm: str = "l2", layer_reduction: str = "sum") -> None:
    options = SPOptions([1.0] * len(student), "mean", layer_reduction, row_norm, 1e-12, row_norm == "l1")
    loss, gradient_matrix = gram.sp_forward(LayerPairs(student, teacher, options), True)
    gram.sp_backward(torch.ones_like(loss), student, gradient_matrix)
    gram.sp_from_grams(torch.stack([gram.grams(student), gram.grams(teacher)]), options, True)


SP_KERNELS = {"product_kernel", "rows_kernel", "gradient_matrix_kernel", "gradient_kernel"}


SP_SIZES = [(batch, HALF) for batch in (1, 16, 64, 200, 600)]
SP_SIZES += [(64, torch.float16), (64, torch.float32), (600, torch.float32)]


@pytest.mark.parametrize(("batch", "dtype"), SP_SIZES, ids=str)
def test_sp_gram(batch: int, dtype: torch.dtype, compiled: list[Any], tmp_path: Path) -> None:
    features = torch.zeros(batch, 1024, dtype=dtype)
    run_sp([features], [features])
    check(compiled, SP_KERNELS, tmp_path)


@pytest.mark.parametrize("layers", [3, 8, 9])
def test_sp_gram_of_several_layers_and_layouts(layers: int, compiled: list[Any], tmp_path: Path) -> None:
    widths = [16 << (i % 4) for i in range(layers)]
    students = [torch.zeros(32, c, 8, 8).contiguous(memory_format=torch.channels_last) for c in widths]
    run_sp(students, [torch.zeros(32, c + 1, 4, 4, dtype=HALF) for c in widths], "l1")
    run_sp([torch.zeros(30, 32).t()], [torch.zeros(32, 7)], layer_reduction="none")
    check(compiled, SP_KERNELS, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 48, 768])
def test_cosine_similarity(n: int, dtype: torch.dtype, compiled: list[Any], tmp_path: Path) -> None:
    a, b = torch.zeros(n, 512, dtype=dtype), torch.zeros(256, 512, dtype=dtype)
    outputs = gram.cosine_forward(a, b)
    gram.cosine_backward(torch.ones_like(outputs[0]), a, b, *outputs)
    gram.cosine_forward(a, b.float() if dtype != torch.float32 else b.half())
    gram.products(a, b)
    check(compiled, {"products_kernel", "cosine_gradient_kernel"}, tmp_path)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "generic": lambda x: x.transpose(2, 3),
}


def run_angular_margin(student: list[Tensor], teacher: list[Tensor], local_weight: float, reduction: str) -> None:
    x = ActivationPairs(student, teacher, [1.0] * len(student), reduction=reduction, local_weight=local_weight)
    _, kappa = angular_margin.forward(x, True)
    energy.backward(torch.ones(len(student), len(student[0])), student, kappa)


AMD_KERNELS = {"energy_kernel", "maps_kernel", "sum_kernel", "gradient_kernel"}


MAPS = [(56, layout, dtype) for layout in LAYOUTS for dtype in DTYPES]
MAPS += [(1, "contiguous", HALF), (7, "contiguous", HALF)]


@pytest.mark.parametrize(("size", "layout", "dtype"), MAPS, ids=str)
def test_angular_margin(size: int, layout: str, dtype: torch.dtype, compiled: list[Any], tmp_path: Path) -> None:
    x = LAYOUTS[layout](torch.zeros(2, 64, size, size, dtype=dtype))
    run_angular_margin([x], [x], 0.0 if size == 1 else 0.2, "mean")
    check(compiled, AMD_KERNELS, tmp_path)


@pytest.mark.parametrize("layers", [4, 9])
def test_angular_margin_of_several_layers(layers: int, compiled: list[Any], tmp_path: Path) -> None:
    shapes = [(2, 64 << (i % 4), 56 >> (i % 4), 56 >> (i % 4)) for i in range(layers)]
    students = [torch.zeros(shape, dtype=HALF) for shape in shapes]
    run_angular_margin(students, [channels_last(x.float()) for x in students], 0.2, "none")
    run_angular_margin(students, students, 0.0, "mean")
    check(compiled, AMD_KERNELS, tmp_path)


ATTENTION_KERNELS = {"energy_kernel", "attention_kernel", "sum_kernel", "gradient_kernel"}


@pytest.mark.parametrize("absolute", [False, True])
def test_attention(absolute: bool, compiled: list[Any], tmp_path: Path) -> None:
    """The energies and the gradient are angular_margin's kernels, which are compiled in all layouts above."""
    for layers, size in ((1, 1), (1, 7), (4, 32), (9, 56)):
        maps = [torch.zeros(2, 64, max(size >> (i % 3), 1), size, dtype=HALF) for i in range(layers)]
        x = AttentionPairs(maps, maps, [1.0] * layers, absolute=absolute)
        _, kappa = energy.forward(x, True)
        energy.backward(torch.ones(layers, 2), maps, kappa)
    energy.energies(maps[0])
    check(compiled, ATTENTION_KERNELS, tmp_path)


@pytest.mark.parametrize(
    "path", sorted(Path(gram.__file__).parents[1].rglob("triton_*.py")), ids=lambda path: path.stem
)
def test_no_field_of_a_constant_record_is_an_argument(path: Path) -> None:
    """Triton 3.6 does not keep it constant, and refuses a string; Triton 3.7 does. Records are passed whole."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    arguments = [x for call in calls for x in (*call.args, *(keyword.value for keyword in call.keywords))]
    fields = {ast.unparse(x) for x in arguments if isinstance(x, ast.Attribute)}
    assert not [x for x in fields if x.split(".")[0].isupper()]
