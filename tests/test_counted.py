"""The counts of GPU kernels: how machine code is read, and the figures that must not grow."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.counted import CASES, MEMORY, WAYS, launch, occupancy
from benchmarks.launched import Work
from benchmarks.sass import Kernel
from kdkernels import doctor
from kdkernels.ops import backend

ROOT = Path(__file__).parents[1]
LINE = '\t//## File "/x/k.cu", line {}'


def instructions(*parts: str) -> list[str]:
    """Lines as nvdisasm writes them: labels, line numbers, and instructions one after another."""
    lines, at = [], 0
    for part in parts:
        if part.startswith("."):
            lines.append(part)
        elif part[0].isdigit():
            lines.append(LINE.format(part))
        else:
            lines.append(f"        /*{at:04x}*/                   {part} ;")
            at += 16
    return lines


# two loads of one line in a loop, of which a switch takes the half-precision one; then what is done once
CODE = instructions(
    *("1", "S2R R0, SR_TID.X"),
    *(".L_x_0:", "2", "@P0 BRA `(.L_x_1)", "3", "LDG.E.64 R2, desc[UR4][R4.64]", "F2F.F32.F64 R2, R2"),
    *("BRA `(.L_x_2)", ".L_x_1:", "4", "LDG.E.U16 R2, desc[UR4][R6.64]", "@P3 LDG.E.U16 R2, desc[UR4][R6.64]"),
    *(".L_x_2:", "5", "MUFU.EX2 R3, R2", "@P1 BRA `(.L_x_0)"),
    *("6", "STG.E desc[UR4][R8.64], R3", "EXIT", ".L_x_3:", "BRA `(.L_x_3)"),
)


def test_the_branch_that_ran_is_counted() -> None:
    kernel = Kernel("k", {"REG": 32}, CODE)
    in_loop, once = kernel.executed({("k.cu:4",): 32 * 4 * 10.0, ("k.cu:6",): 128.0}, warps=1)
    assert in_loop.passes == 10
    assert [i.name for i in in_loop.instructions] == ["BRA", "LDG", "LDG", "MUFU", "BRA"]
    assert in_loop.global_loads == {2: 2}
    assert in_loop.clocks["special functions"] == 20
    assert [i.name for i in once.instructions] == ["S2R", "STG", "EXIT"]
    other, _ = kernel.executed({("k.cu:3",): 32 * 8 * 7.0, ("k.cu:6",): 128.0}, warps=1)
    assert other.passes == 7
    assert [i.name for i in other.instructions] == ["BRA", "LDG", "F2F", "BRA", "MUFU", "BRA"]


def test_the_slowest_resource_is_the_prediction() -> None:
    kernel = Kernel("k", {"REG": 32}, CODE)
    places = {("k.cu:4",): 32 * 4 * 1e6, ("k.cu:6",): 128.0}
    found = launch(Work(1, "k", 132, 128, 0, 6000000, 6e6, 6e6, 5e6, places), kernel, 128, 0)
    assert found.seconds["memory"] == 6e6 / MEMORY
    assert found.seconds["special functions"] == pytest.approx(2e6 / 132 / 1.7e9)
    assert found.bound == "loads"  # two of the loop, the conflicts of banks, and each warp's store
    assert found.seconds["loads"] == pytest.approx((7e6 + 4 * 132) / 132 / 1.7e9)


@pytest.mark.parametrize(("kind", "share"), [((32, 256, 0), 1.0), ((64, 256, 0), 0.5), ((32, 128, 114 << 10), 0.0625)])
def test_occupancy(kind: tuple[int, int, int], share: float) -> None:
    assert occupancy(*kind) == share


def test_the_doctor_names_what_is_counted() -> None:
    assert doctor.COUNTED.keys() == doctor.MEASURED.keys() == WAYS.keys()
    for ops in doctor.COUNTED.values():
        assert {case.group for case in CASES} == set(ops) <= set(backend.OPS)


class Most(NamedTuple):
    """Of a step: launches, bytes of memory over the floor, warps' requests to it over what 16-byte loads would take."""

    launches: int
    traffic: float
    requests: float


MOST = {
    "kd 64x100 float32": Most(3, 1.1, 11),
    "kd 4096x1000 bfloat16": Most(3, 1.1, 13),
    "sp resnet8x4 64x256x8x8 bfloat16": Most(3, 1.8, 17),
    "sp resnet8x4, 3 stages float32": Most(3, 1.2, 7.5),
    "cosine 256x512 bfloat16": Most(2, 2.6, 47),
    "at resnet8x4 64x256x8x8 bfloat16": Most(3, 1.1, 2.0),
    "amd resnet8x4 64x256x8x8 bfloat16": Most(3, 1.1, 2.0),
    "amd resnet8x4, 3 stages float32": Most(3, 1.1, 2.0),
}


@pytest.fixture(scope="module")
def counts() -> dict[str, Most]:
    """In a process of its own: the executor takes the native library's place."""
    pytest.importorskip("triton")
    code = f"""
import json, sys
sys.path[:0] = ["tests"]
from cuda_on_cpu import build
if build.why_not():
    sys.exit("executor: " + build.why_not())
from benchmarks import counted, launched
cases = [case for case in counted.CASES if case.label in {list(MOST)}]
found = {{}}
for case, works in zip(cases, launched.native(cases)):
    moved, requests = (sum(min(w.distinct, w.once) for w in works), sum(w.requests for w in works))
    found[case.label] = len(works), moved / case.bytes, 512 * requests / case.bytes
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 1 and done.stderr.startswith("executor:"):
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    return {label: Most(*values) for label, values in json.loads(done.stdout).items()}


@pytest.mark.slow
@pytest.mark.xdist_group("counted")
@pytest.mark.parametrize("label", MOST)
def test_counts_do_not_grow(counts: dict[str, Most], label: str) -> None:
    found, most = counts[label], MOST[label]
    assert found.launches <= most.launches
    assert found.traffic <= most.traffic
    assert found.requests <= most.requests


def test_the_table_of_the_docs_is_the_reports() -> None:
    counted = {}
    for line in (ROOT / "benchmarks" / "results" / "counted-sm90.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 8 and cells[2] in ("native", "triton"):
            counted[cells[1], cells[2]] = cells[6]
    page = (ROOT / "docs" / "backends.md").read_text()
    rows = re.findall(r"^\| ([a-z].*) \| \d+ \| \d+ \| (\d+) \| (\d+) \|$", page, re.M)
    assert len(rows) == 12
    for label, *found in rows:
        case = label.replace(" bf16", " bfloat16") if " bf16" in label else f"{label} float32"
        assert found == [f"{float(counted[case, backend]):.0f}" for backend in ("native", "triton")], label
