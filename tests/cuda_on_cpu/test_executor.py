"""The executor itself: kernels that keep a rule run and give the right numbers, those that break one say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import build
from .library import Probe, launches
from .sources import to_cpp

pytestmark = pytest.mark.xdist_group("executor")

SOURCE = Path(__file__).with_name("probe_rules.cu")
LANES = torch.arange(64, dtype=torch.int32) % 32


def _probe(mode: str) -> Probe:
    reason = build.why_not()
    if reason:
        pytest.skip(reason)
    return Probe(mode, SOURCE)


@pytest.fixture(scope="module", params=["plain forwards", "plain backwards", "checked forwards", "checked backwards"])
def either(request: pytest.FixtureRequest) -> Probe:
    mode, order = request.param.split()
    probe = _probe(mode)
    probe.library.cuda_on_cpu_reverse(int(order == "backwards"))
    return probe


@pytest.fixture(scope="module")
def checked() -> Probe:
    probe = _probe("checked")
    probe.library.cuda_on_cpu_reverse(0)
    return probe


def numbers(count: int = 64) -> torch.Tensor:
    return torch.full((count,), -1, dtype=torch.int32)


def test_partial_masks(either: Probe) -> None:
    out = numbers()
    assert either.run("run_half_warps", out, outputs=(0,)) == ""
    assert torch.equal(out, torch.where(LANES < 16, 120, 376).int())


def test_votes_and_shuffles(either: Probe) -> None:
    out = numbers()
    assert either.run("run_votes", out, outputs=(0,)) == ""
    down = torch.where(LANES < 30, LANES + 2, LANES)
    up = torch.where(LANES % 8 >= 3, LANES - 3, LANES)
    one = LANES // 8 * 8 + 1  # lane 9 of groups of eight is their lane 1
    expected = 40 + 100 + 5000 + 10000 * down + 1000000 * up + (100000000 * one.long())
    assert torch.equal(out, expected.int())


def test_divergent_barriers_and_missing_lanes(either: Probe) -> None:
    assert "divergent barrier" in either.run("run_divergent_barrier", numbers(), outputs=(0,))
    assert "wait for ever" in either.run("run_missing_lanes", numbers(), outputs=(0,))


def test_one_barrier_called_from_two_places(checked: Probe) -> None:
    assert "from elsewhere" in checked.run("run_divergent_helper", numbers(), outputs=(0,))


def test_dynamic_shared_memory_and_its_limits(either: Probe) -> None:
    out = numbers(128)
    assert either.run("run_fill_shared", out, 256, 1024, 0, outputs=(0,)) == ""
    assert torch.equal(out, (255 - torch.arange(64, dtype=torch.int32)).repeat(2))
    assert "more shared memory" in either.run("run_fill_shared", out, 16384, 65536, 0, outputs=(0,))
    assert either.run("run_fill_shared", out, 16384, 65536, 65536, outputs=(0,)) == ""


def test_warps_are_no_barriers(checked: Probe) -> None:
    out = numbers()
    assert checked.run("run_swap", out, 1, outputs=(0,)) == ""
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ 1)
    message = checked.run("run_swap", out, 0, outputs=(0,))
    assert "race" in message or "never written" in message


@pytest.mark.parametrize("fenced", [True, False])
def test_the_last_block_may_read_what_fences_released(checked: Probe, fenced: bool) -> None:
    out, parts, arrived = numbers(1), numbers(6 * 32), numbers(1)
    message = checked.run("run_last_block", out, parts, arrived, int(fenced), outputs=(0, 1, 2))
    if fenced:
        assert message == ""
        assert out.item() == 6 * 31 * 16
    else:
        assert "race between blocks" in message


def test_accesses(checked: Probe) -> None:
    assert "alignment" in checked.run("run_vector_load", torch.ones(9), 1, torch.empty(4), outputs=(2,))
    assert "write to 0 bytes behind the end of a tensor of 252" in checked.run("run_swap", numbers(63), 1, outputs=(0,))
    assert "shared memory that is no variable's" in checked.run(
        "run_fill_shared", numbers(), 257, 1024, 0, outputs=(0,)
    )
    assert "never written" in checked.run("run_unwritten", numbers(4), numbers(4), outputs=(1,))
    assert "write to an input" in checked.run("run_in_place", numbers(4))
    message = checked.run("run_last_block", numbers(1), numbers(192), numbers(1)[:0], 1, outputs=(0, 1, 2))
    assert "cudaMemsetAsync: write to" in message


def test_launches_are_counted(checked: Probe) -> None:
    launches(checked.library)
    assert checked.run("run_swap", numbers(), 1, outputs=(0,)) == ""
    (launch,) = launches(checked.library)
    assert launch.kernel == "swap_in_warps"
    assert (launch.grid, launch.block) == ((1, 1, 1), (64, 1, 1))
    assert (launch.dynamic_shared, launch.static_shared) == (0, 256)
    assert (launch.read, launch.written, launch.distinct_written) == (0, 256, 256)


@pytest.mark.parametrize(
    ("stride", "sectors", "conflicts"), [(1, 4, 0), (2, 8, 1), (8, 32, 7), (32, 32, 31), (33, 32, 0)]
)
def test_sectors_and_bank_conflicts(checked: Probe, stride: int, sectors: int, conflicts: int) -> None:
    source = torch.empty(33 * 32 + 16, dtype=torch.int32)
    source = source[-(source.data_ptr() // 4) % 8 :]  # its first element begins a sector
    launches(checked.library)
    checked.library.cuda_on_cpu_count(1)
    assert checked.run("run_strided", source.zero_(), stride, numbers(32), outputs=(2,)) == ""
    checked.library.cuda_on_cpu_count(0)
    (launch,) = launches(checked.library)
    assert (launch.global_requests, launch.shared_requests) == (2, 2)
    assert launch.sectors in (sectors + 4, sectors + 5)  # the output's 128 bytes begin anywhere
    assert launch.bank_conflicts == 2 * conflicts
    assert launch.distinct_read == 128


def test_the_last_block_of_a_sample(checked: Probe) -> None:
    launches(checked.library)
    checked.library.cuda_on_cpu_count(1)
    checked.library.cuda_on_cpu_sample(3)
    assert checked.run("run_last_block", numbers(1), numbers(6 * 32), numbers(1), 1, outputs=(0, 1, 2)) == ""
    checked.library.cuda_on_cpu_sample(0)
    checked.library.cuda_on_cpu_count(0)
    (launch,) = launches(checked.library)
    place, parts = max(launch.last_bytes.items(), key=lambda item: item[1])
    assert parts == 6 * 32 * 4
    assert launch.last_sectors == 6 * 32 + 1  # and the sum
    assert launch.bytes[place] * 6 / launch.blocks_run == parts  # of the six blocks one comes last


def test_a_vector_is_one_access(checked: Probe) -> None:
    source = torch.ones(136)
    source = source[-(source.data_ptr() // 4) % 8 :][:128]
    out = torch.empty(32)
    launches(checked.library)
    checked.library.cuda_on_cpu_count(1)
    assert checked.run("run_vectors", source, out, outputs=(1,)) == ""
    checked.library.cuda_on_cpu_count(0)
    (launch,) = launches(checked.library)
    assert launch.global_requests == 2
    assert launch.sectors in (16 + 4, 16 + 5)
    assert torch.equal(out, torch.full((32,), 4.0))


def test_sources_keep_their_lines() -> None:
    text = "__global__ void f(const __grid_constant__ A<int,\n B<2>>\n a) {\n#pragma unroll 4\n"
    text += "  __shared__ T x[2][N + 1],\n      y;\n}\n"
    text += "void g() { n::f<T, true><<<ceil_div(a, b),\n 32, 0, stream>>>(a); }\n"
    lines = to_cpp(text, "f.cu").splitlines()
    assert lines[0] == '#line 1 "f.cu"'
    assert "".join(lines[1:4]) == "__global__ void f(const A<int, B<2>>& a) {"
    assert lines[4] == ""
    assert lines[5] == "  CUDA_ON_CPU_SHARED(T, x, [2][N + 1], 1); CUDA_ON_CPU_SHARED(T, y, , 1);"
    assert lines[7] == "}"
    assert lines[8].startswith('void g() { cuda_on_cpu::Launcher("f", &n::f<T, true>, cuda_on_cpu::Configuration(')
    assert lines[9] == " 32, 0, stream))(a); }"
