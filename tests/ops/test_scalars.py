"""csrc/numbers.h: exponentials, logarithms and 16-bit formats, number by number. Op tests let a few ulps pass."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from native_tools import ROOT, compiler

from kdkernels.ops import native_build

ULP = np.finfo(np.float32).eps
CSRC = Path(os.environ.get("KDKERNELS_TEST_CSRC", ROOT / "csrc"))  # where a mutant is
Array = np.ndarray[tuple[int], np.dtype[np.generic]]
Apply = Callable[..., Array]


@pytest.fixture(scope="module", params=["plain", "fma"])
def apply(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Apply:
    """``apply(name, x, dtype)``: that function of scalars.cpp on every number."""
    flags = ["-mavx2", "-mfma"] if request.param == "fma" else []
    if flags and native_build.host_isa() == "base":
        pytest.skip("this machine has no fused multiply-add")
    library = tmp_path_factory.mktemp("scalars") / "scalars.so"
    call = [
        compiler(),
        *native_build.CXX_FLAGS,
        *native_build.KERNEL_FLAGS,
        *flags,
        "-shared",
        "-fvisibility=default",
        f"-I{CSRC}",
    ]
    subprocess.run([*call, str(Path(__file__).with_name("scalars.cpp")), "-o", str(library)], check=True)
    functions = ctypes.CDLL(str(library))

    def applied(name: str, x: Array, dtype: type[np.generic] = np.float32) -> Array:
        out = np.empty(len(x), dtype)
        functions[name](ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(len(x)))
        return out

    return applied


def check(actual: Array, exact: Array, ulps: float) -> None:
    error = np.abs(actual.astype(np.float64) - exact) / np.maximum(np.abs(exact), np.finfo(np.float32).tiny)
    worst = error.argmax()
    assert error[worst] <= ulps * ULP, f"{error[worst] / ULP:.2f} ulp at {exact[worst]!r}"


def negative(most: float) -> Array:
    """Of all magnitudes down to the smallest, and dense on the scale of the results."""
    return -np.concatenate([np.geomspace(1e-30, most, 100_001), np.linspace(0, most, 100_001)]).astype(np.float32)


@pytest.mark.parametrize("name", ["exp_of", "both_exp"])
def test_exponentials(apply: Apply, name: str) -> None:
    x = negative(87.3365)
    check(apply(name, x), np.exp(x.astype(np.float64)), 2)
    ends = np.array([0, -0.0, -87.3366, -88, -1e4, -1e38, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(apply(name, ends), np.array([1, 1, 0, 0, 0, 0, 0, np.nan], np.float32))


@pytest.mark.parametrize("name", ["expm1_of", "both_expm1"])
def test_exponentials_less_1(apply: Apply, name: str) -> None:
    x = negative(87.0)
    check(apply(name, x), np.expm1(x.astype(np.float64)), 2)
    ends = np.array([0, -87.5, -1e4, -np.inf], np.float32)
    np.testing.assert_array_equal(apply(name, ends), np.array([0, -1, -1, -1], np.float32))


def test_logarithms(apply: Apply) -> None:
    y = np.concatenate([-negative(1.0), np.float32(0.41421356) + np.arange(-9, 9, dtype=np.float32) * ULP])
    check(apply("log1p_of", y), np.log1p(y.astype(np.float64)), 2)
    y = -negative(1.0)
    y = y[y < 1]
    check(apply("log_1m_of", y), np.log1p(-y.astype(np.float64)), 4)
    assert np.isnan(apply("log_1m_of", np.array([np.nan], np.float32)))[0]


FORMATS = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("name", list(FORMATS))
def test_16_bits(apply: Apply, name: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(every.view(np.int16)).view(FORMATS[name]).float().numpy()
    wide = apply(f"widen_{name}", every)
    np.testing.assert_array_equal(wide, expected)
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(expected))
    numbers = wide[np.isfinite(wide)]
    middle = (numbers[:-1].astype(np.float64) + numbers[1:]) / 2  # ties, and both their neighbours
    ties = middle.astype(np.float32)
    x = np.concatenate([wide, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    x = np.concatenate([x, np.array([np.inf, -np.inf, np.nan, 65519.9, 65520, 3.4e38, -3.4e38, 1e-45], np.float32)])
    back = apply(f"narrow_{name}", x, np.uint16)
    rounded = torch.from_numpy(x).to(FORMATS[name])
    expected = rounded.view(torch.int16).numpy().view(np.uint16)
    is_number = ~rounded.isnan().numpy()
    np.testing.assert_array_equal(back[is_number], expected[is_number])
    assert np.isnan(apply(f"widen_{name}", back[~is_number])).all()
