"""The peak memory of MLKD's correlation beside the published broadcast form, measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE
from forks import Fork
from torch import Tensor


def broadcast_correlation(student: Tensor, teacher: Tensor, views: int, tau: float) -> Tensor:
    """As published: every view row against every base row in one (rows, d, B) product."""
    base = torch.arange(student.shape[0], device=student.device) % views == 0
    log_q, q = (
        F.cosine_similarity(x[~base][:, :, None], x[base].t()[None], dim=1).div(tau).log_softmax(1)
        for x in (student, teacher)
    )
    return F.kl_div(log_q, q.exp(), reduction="batchmean")


MEASURE = r"""
import re, sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
from kdkernels import correlation_loss
from test_mlkd_memory import broadcast_correlation
torch.set_num_threads(1)
form = broadcast_correlation if {form!r} == "broadcast" else correlation_loss
def step(images):
    student = torch.randn(4 * images, 512, requires_grad=True)
    teacher = torch.randn(4 * images, 512)
    form(student, teacher, 4, 0.5).backward() if form is broadcast_correlation else form(student, teacher).backward()
def memory(what):
    return int(re.search(what + r":\s+(\d+) kB", open("/proc/self/status").read())[1])
step(2)
before = memory("VmRSS")
step(128)
print(memory("VmHWM") - before)  # not ru_maxrss, which begins with the parent's
"""


@pytest.mark.skipif(DEVICE != "cpu" or not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_of_correlation_is_under_a_twentieth_of_the_broadcast_form() -> None:
    root = Path(__file__).parents[1]
    peak = {}
    for form in ("broadcast", "here"):
        code = MEASURE.format(tests=str(Path(__file__).parent), root=str(root), form=form)
        process = Fork(code, {**os.environ, "PYTHONPATH": str(root)})
        output, _ = process.communicate()
        assert process.returncode == 0, output
        peak[form] = int(output.splitlines()[-1])
    print(peak)
    assert peak["broadcast"] > 250_000  # KiB: three of its (384, 512, 128) products
    assert 0 < peak["here"] * 20 < peak["broadcast"], peak
