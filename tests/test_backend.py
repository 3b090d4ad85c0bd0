"""The choice of a backend: requests, refusals, fallbacks, what is logged and what the doctor says."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import kdkernels
from kdkernels import cli, sp_loss
from kdkernels.ops import backend
from kdkernels.ops.gram import reference

X = torch.ones(3, 4)


@pytest.fixture
def fake_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A native backend for gram that counts its calls and refuses what it is told to."""

    def sp_forward(*args: object) -> tuple[Tensor, Tensor]:
        module.calls += 1
        return reference.sp_forward(*args)

    module = SimpleNamespace(
        calls=0,
        reason=None,
        supports=lambda *tensors: module.reason,
        sp_forward=sp_forward,
        sp_backward=reference.sp_backward,
    )
    real = backend.load
    monkeypatch.setattr(backend, "load", lambda op, name: module if name == "native" else real(op, name))
    backend._log_fallback.cache_clear()
    yield module
    backend._log_fallback.cache_clear()


def test_auto_takes_the_first_that_supports_the_arguments(
    fake_native: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    sp_loss(X, X)
    assert fake_native.calls == 1
    fake_native.reason = "no such thing"
    with caplog.at_level(logging.INFO, logger="kdkernels"):
        sp_loss(X, X)
        sp_loss(X, X)
    assert fake_native.calls == 1
    assert [r.message for r in caplog.records] == ["gram on cpu runs on the reference backend: native: no such thing"]


def test_a_request_that_cannot_be_met_raises_with_the_reason(fake_native: SimpleNamespace) -> None:
    fake_native.reason = "no such thing"
    with kdkernels.use_backend("native"), pytest.raises(kdkernels.BackendError, match=r"'native'.*gram: no such thing"):
        sp_loss(X, X)


def test_a_compiled_graph_follows_a_change_of_backend(fake_native: SimpleNamespace) -> None:
    compiled = torch.compile(lambda x: sp_loss(x, x * x), backend="aot_eager", fullgraph=True)
    with kdkernels.use_backend("reference"):
        first = compiled(X)
        assert fake_native.calls == 0
    with kdkernels.use_backend("native"):
        assert torch.equal(compiled(X), first)
    assert fake_native.calls == 1


def test_use_backend_nests_and_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_BACKEND", "triton")
    assert backend.requested() == "triton"
    with kdkernels.use_backend("reference"):
        assert backend.requested() == "reference"
        with kdkernels.use_backend("auto"):
            assert backend.requested() == "auto"
        assert backend.requested() == "reference"
    assert backend.requested() == "triton"
    monkeypatch.setenv("KDKERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"KDKERNELS_BACKEND must be one of 'auto', 'native'.*got 'fast'"):
        sp_loss(X, X)
    with pytest.raises(ValueError, match="got 'cuda'"), kdkernels.use_backend("cuda"):
        pass


def test_threads_choose_for_themselves() -> None:
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:

        def seen() -> list[str]:
            return [thread.submit(backend.requested).result() for thread in (first, second)]

        before = backend.requested()
        one, other = kdkernels.use_backend("reference"), kdkernels.use_backend("triton")
        first.submit(one.__enter__).result()
        assert seen() == ["reference", "reference"]  # who has chosen nothing follows, as autograd's threads must
        second.submit(other.__enter__).result()
        assert seen() == ["reference", "triton"]
        with pytest.raises(kdkernels.BackendError, match="have chosen 'reference' and 'triton'"):
            sp_loss(X, X)
        with kdkernels.use_backend("native"):
            assert backend.requested() == "native"
        first.submit(one.__exit__, None, None, None).result()  # they leave in the order in which they came
        assert seen() == ["triton", "triton"]
        second.submit(other.__exit__, None, None, None).result()
        assert seen() == [before, before]


def test_importing_builds_nothing_and_imports_no_triton() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import kdkernels;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "bad = new & {'triton', 'subprocess', 'sklearn', 'accelerate', 'rich', 'matplotlib'}; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_function_and_module_share_a_name() -> None:
    code = (
        "import kdkernels.sp_loss, torch; from kdkernels import sp_loss, SPLoss, kd_loss, stkd_loss, amd_loss;"
        "from kdkernels.sp_loss import SPLoss as S; assert S is SPLoss; x = torch.ones(2, 3);"
        "assert kdkernels.sp_loss is sp_loss; assert float(kdkernels.sp_loss(x, x)) == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_order_on_cuda_follows_from_the_table() -> None:
    text = (Path(__file__).parents[1] / "docs" / "backends.md").read_text()
    rows = re.findall(r"^\|.*\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)
    assert len(rows) >= 8
    longer = [(max(int(n_host), int(n_gpu)), max(int(t_host), int(t_gpu))) for n_host, t_host, n_gpu, t_gpu in rows]
    first = "native" if all(native <= triton for native, triton in longer) else "triton"
    assert backend.AUTO_ORDER["cuda"][0] == first


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    ops = (*backend.OPS, *backend.CPU_OPS)
    for op in ops:
        assert f"  {op}\n" in text
    assert text.count("counted, not measured\n") == 2 * len(backend.OPS)  # native and Triton
    assert text.count("-> ") == len(ops) * (2 if torch.cuda.is_available() else 1)
