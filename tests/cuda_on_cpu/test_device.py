"""Which devices the native CUDA kernels run on: the library is asked once for each, before anything is launched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import build

# on the executor, whose device answers as it is told; the real library must not be loaded, so in a process of its own
CODE = """
import json, sys
sys.path[:0] = ["tests"]
import torch
from types import SimpleNamespace
from cuda_on_cpu.library import install
from kdkernels.ops import native

executor = install("plain")
said = {}
for index, status in enumerate((0, 209, 35, 999)):
    executor.cuda_on_cpu_images(status)
    x = SimpleNamespace(is_cpu=False, dtype=torch.float32, device=torch.device("cuda", index))
    said[status] = native.supports(x)
    executor.cuda_on_cpu_images(0)
    assert native.supports(x) == said[status]  # asked once
    assert native.supports(SimpleNamespace(is_cpu=False, dtype=torch.int8, device=x.device)) != said[status]
print(json.dumps(said))
"""


def test_a_device_without_an_image_says_so() -> None:
    reason = build.why_not()
    if reason:
        pytest.skip(reason)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["0"] is None
    assert "cuda:1: they are built for compute capability 8.0 and up" in said["209"]
    assert "cuda:2: its driver is older than the CUDA toolkit" in said["35"]
    assert "cuda:3: CUDA error 999" in said["999"]
