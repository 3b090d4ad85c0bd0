"""csrc/ptx.cuh: its CPU branch against matrix products and the manual's layouts; its PTX through nvcc."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from kdkernels.ops import native_build

from . import build, sources
from .library import Probe, launches

pytestmark = pytest.mark.xdist_group("executor")

SOURCE = Path(__file__).with_name("probe_ptx.cu")


@pytest.fixture(scope="module", params=list(build.MODES))
def probe(request: pytest.FixtureRequest) -> Probe:
    reason = build.why_not()
    if reason:
        pytest.skip(reason)
    return Probe(request.param, SOURCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_16816(probe: Probe, dtype: torch.dtype) -> None:
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.empty(16, 8)
    assert probe.run("mma_bf16" if dtype == torch.bfloat16 else "mma_fp16", a, b, d, outputs=(2,)) == ""
    torch.testing.assert_close(d, a.float() @ b.float() + 1, rtol=1e-6, atol=1e-5)


def test_mma_tf32_reads_the_upper_19_bits(probe: Probe) -> None:
    a, b, d = torch.randn(16, 8), torch.randn(8, 8), torch.empty(16, 8)
    assert probe.run("mma_tf32", a, b, d, outputs=(2,)) == ""
    upper = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b)]
    torch.testing.assert_close(d, upper[0] @ upper[1], rtol=1e-6, atol=1e-5)
    assert (d - a @ b).abs().max() > 1e-4  # and no more of them


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(probe: Probe, count: int, transposed: bool) -> None:
    matrices = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    out = torch.empty(count, 32, dtype=torch.int32)
    assert probe.run("matrices", matrices, out, count, int(transposed), outputs=(1,)) == ""
    rows = (matrices.mT if transposed else matrices).int()  # lane 4 g + t: numbers 2 t, 2 t + 1 of row g
    assert torch.equal(out.view(count, 8, 4), rows[..., ::2] | rows[..., 1::2] << 16)


@pytest.mark.parametrize("width", [8, 16, 40, 64])
def test_a_tile_through_asynchronous_copies(probe: Probe, width: int) -> None:
    a, b, d = torch.randn(16, width).bfloat16(), torch.randn(8, width).bfloat16(), torch.empty(16, 8)
    assert probe.run("tile", a, b, width, d, 1, outputs=(3,)) == ""
    torch.testing.assert_close(d, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)
    message = probe.run("tile", a, b, width, d, 0, outputs=(3,))  # without the wait
    assert "never written" in message or d.isnan().any()


def test_copies_and_fragments_are_counted() -> None:
    reason = build.why_not()
    if reason:
        pytest.skip(reason)
    probe, steps = Probe("checked", SOURCE), 4
    launches(probe.library)
    probe.library.cuda_on_cpu_count(1)
    probe.library.cuda_on_cpu_sample(1)
    a, b, d = torch.randn(16, 16 * steps).bfloat16(), torch.randn(8, 16 * steps).bfloat16(), torch.empty(16, 8)
    assert probe.run("tile", a, b, 16 * steps, d, 1, outputs=(3,)) == ""
    probe.library.cuda_on_cpu_sample(0)
    probe.library.cuda_on_cpu_count(0)
    (launch,) = launches(probe.library)
    assert launch.global_requests == 2 * steps + 4  # 48 copies of a step by 32 lanes, and four stores
    assert launch.shared_requests == 4 * steps  # the copies' other side, and two ldmatrix
    assert launch.bank_conflicts == 6 * steps  # rows of 32 bytes: two of a matrix's eight in each bank
    assert sum(launch.bytes.values()) == steps * (2 * 48 * 16 + 24 * 32) + 16 * 8 * 4


def test_nvcc_accepts_the_ptx(tmp_path: Path) -> None:
    toolkit = native_build.find_cuda()
    if toolkit is None:
        pytest.skip("no nvcc")
    output = tmp_path / "probe.cubin"
    command = [
        f"{toolkit}/bin/nvcc",
        "-std=c++17",
        "-arch=sm_90",
        "-cubin",
        f"-I{sources.CSRC}",
        str(SOURCE),
        "-o",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert output.stat().st_size > 1000
