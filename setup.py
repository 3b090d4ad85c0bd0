"""Builds csrc/ ahead of time where torch is at hand, and packs its sources; all else is declared in pyproject.toml.

KDKERNELS_BUILD_NATIVE=auto (default)  build if torch and a compiler are there, with CUDA if nvcc is; else a pure Python
                                       package, which builds csrc/ when it is first used
KDKERNELS_BUILD_NATIVE=0               never build
KDKERNELS_BUILD_NATIVE=1               fail, naming what is missing, if it cannot be built
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MODE = os.environ.get("KDKERNELS_BUILD_NATIVE", "auto")


def native_build():
    """kdkernels/ops/native_build.py by its path: importing kdkernels would import torch."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "kdkernels" / "ops" / "native_build.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan():
    """What to build, or None for a pure Python package."""
    if MODE not in ("auto", "0", "1"):
        raise SystemExit(f"KDKERNELS_BUILD_NATIVE must be auto, 0 or 1, got {MODE!r}")
    if MODE == "0":
        return None
    build = native_build()
    try:
        return build.plan(ROOT / "kdkernels", isas=build.all_isas(), cuda=True)
    except build.BuildError as error:
        if MODE == "1":
            raise SystemExit(f"KDKERNELS_BUILD_NATIVE=1, and the native kernels cannot be built: {error}") from error
        print(f"kdkernels: building no native kernels ahead of time: {error}")
        return None


class BuildNative(build_ext):
    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        print(sys.modules["native_build"].build(PLAN, ROOT / "build" / PLAN.key(), output))


PLAN = plan()
NATIVE = {}
if PLAN is not None:
    print(f"kdkernels: building the native kernels for the CPU{' and CUDA' if PLAN.cuda else ''}")
    # a library for torch.ops.load_library, no Python module: one file serves every Python and every torch from 2.11 on
    NATIVE = {
        "ext_modules": [Extension("kdkernels._native", sources=[], py_limited_api=True)],
        "cmdclass": {"build_ext": BuildNative},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }
setup(
    # csrc/ travels in the package, for builds at first use
    packages=[*find_packages(str(ROOT), include=["kdkernels", "kdkernels.*"]), "kdkernels.csrc"],
    package_dir={"kdkernels.csrc": "csrc"},
    **NATIVE,
)
