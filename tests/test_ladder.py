"""How many of the package's own calls lie between a public loss and its kernel, and back: small losses wait on them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor

import kdkernels
from kdkernels.ops import backend

PACKAGE = str(Path(kdkernels.__file__).parent)
MOST = 20


def calls(function: Callable[[], object]) -> list[str]:
    """The package's functions that a second call of ``function`` calls, comprehensions among them."""
    found: list[str] = []

    def hear(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            found.append(f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_firstlineno} {code.co_name}")

    function()
    before = sys.getprofile()
    sys.setprofile(hear)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found


def losses() -> dict[str, Callable[[], Tensor]]:
    student, teacher = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    maps, other = torch.randn(6, 3, 4, 4, requires_grad=True), torch.randn(6, 2, 4, 4)
    return {
        "sp_loss": lambda: kdkernels.sp_loss(student, teacher),
        "stkd_loss": lambda: kdkernels.stkd_loss(student, teacher, torch.arange(6)),
        "amd_loss": lambda: kdkernels.amd_loss(maps, other),
        "nkd_loss": lambda: kdkernels.nkd_loss(student, teacher, torch.arange(6)),
        "dist_loss": lambda: kdkernels.dist_loss(student, teacher),
        "cwd_loss": lambda: kdkernels.cwd_loss(maps, maps.detach()),
    }


@pytest.mark.skipif(
    backend.why_not("gram", "native", torch.ones(2, 2)) is not None, reason="there are no native kernels here"
)
@pytest.mark.parametrize("name", list(losses()))
def test_a_forward_pass_takes_few_calls(name: str) -> None:
    with kdkernels.use_backend("native"):
        found = calls(losses()[name])
    print(name, len(found), *found, sep="\n")
    assert found[0].endswith(name)
    assert any("native.py" in call and call.endswith("forward") for call in found)
    assert len(found) <= MOST, "\n".join(found)
