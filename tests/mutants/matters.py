"""Which tests a mutant has to pass: those of its op or loss, and what they are run with."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cuda_on_cpu.sources import csrc, included

from .changes import ROOT

OPS = {
    "angular_margin": ("ops/test_angular_margin.py",),
    "channel_gram": ("ops/test_channel_gram.py", "test_map_losses.py"),
    "correlation": ("ops/test_correlation.py",),
    "energy": ("ops/test_energy.py", "ops/test_angular_margin.py"),
    "gram": ("ops/test_gram.py", "ops/test_split_products.py", "ops/test_correlation.py"),
    "linear_kd": ("test_linear_kd.py", "test_linear_kd_memory.py"),
    "multi_level": ("ops/test_logit_rows.py", "test_logit_losses.py"),
    "neighbour_correlation": ("ops/test_neighbour_correlation.py",),
    "nkd": ("ops/test_logit_rows.py", "test_logit_losses.py"),
    "relation": ("ops/test_relation.py", "test_relational_losses.py"),
    "softmax_kl": ("ops/test_softmax_kl.py", "ops/test_divergences.py"),
    "softmax_pearson": ("ops/test_logit_rows.py", "test_logit_losses.py"),
}
EVERY_OP = ("ops/test_guards.py", "ops/test_reference.py")
LOSSES = (
    "test_losses.py",
    "test_map_losses.py",
    "test_relational_losses.py",
    "test_logit_losses.py",
    "test_linear_kd.py",
    "test_mlkd.py",
    "test_corsd.py",
    "test_reductions.py",
    "test_edges.py",
    "test_errors.py",
    "test_reduction_errors.py",
    "test_divergence_options.py",
    "test_golden.py",
)
SHARED = {  # what all ops and losses stand on
    "backend.py": ("test_backend.py",),
    "checks.py": ("test_errors.py", "test_reduction_errors.py", "test_edges.py", "test_losses.py"),
    "changing.py": ("ops/test_changing.py",),
    "library.py": ("ops/test_library.py",),
    "saved.py": ("ops/test_library.py", "test_modules.py"),
    "native.py": ("test_backend.py", "ops/test_library.py"),
}
# definition.py is what tests are held against; a build takes longer than the mutants of its flags are worth
LEFT_OUT = ("definition.py", "native_build.py", "__init__.py")
SLOW = "not compil and not nearest_peers and not processes"


class Run(NamedTuple):
    tests: tuple[str, ...]
    words: str  # pytest's -k
    environment: tuple[tuple[str, str], ...] = ()


def files() -> list[Path]:
    """All that is mutated: csrc for CPUs, ops and losses."""
    sources = {name for name in csrc() if name.endswith(".cpp")}
    sources |= {header for name in sources for header in includes(name)}
    found = [ROOT / "csrc" / name for name in sources]
    python = [*(ROOT / "kdkernels").glob("*_loss.py"), *(ROOT / "kdkernels" / "ops").glob("**/*.py")]
    return sorted([*found, *(path for path in python if path.name not in LEFT_OUT)])


@cache
def includes(source: str) -> frozenset[str]:
    texts = csrc()
    return frozenset(included(texts[source], {name: text for name, text in texts.items() if name.endswith(".h")}))


def sources_of(name: str) -> list[str]:
    """The .cpp files that a file of csrc/ is compiled in."""
    return [s for s in csrc() if s.endswith(".cpp") and (s == name or name in includes(s))]


@cache
def run(path: str) -> Run:
    """What a change to this file has to pass."""
    name = Path(path).name
    if name == "numbers.h":
        return _run(["ops/test_scalars.py", *EVERY_OP], SLOW)
    if path.startswith("csrc/"):
        own = re.sub(r"^bindings_|\.\w+$", "", name)
        ops = [own] if own in OPS else [s.removesuffix(".cpp") for s in sources_of(name)]
        tests = [test for op in ops for test in OPS.get(op, ())] or [test for op in OPS for test in OPS[op]]
        return _run([EVERY_OP[0], *tests], f"{SLOW} and not opcheck and not [reference and not [triton")
    if path.startswith("kdkernels/ops/"):
        folder = Path(path).parent.name
        if name.startswith("triton"):
            tests = [f"ops/test_{folder}.py"] if folder in OPS else [OPS[op][0] for op in ("gram", "softmax_kl")]
            return _run([EVERY_OP[0], *tests], f"{SLOW} and not opcheck", TRITON_INTERPRET="1")
        words = f"{SLOW} and not [native" if "reference" in name else SLOW
        return _run([*OPS.get(folder, SHARED.get(name, ())), *EVERY_OP], words)
    function = name.removesuffix(".py")
    return _run([test for test in LOSSES if re.search(rf"\b{function}\b", (ROOT / "tests" / test).read_text())], SLOW)


def _run(tests: list[str], words: str, **environment: str) -> Run:
    unique = dict.fromkeys(f"tests/{test}" for test in tests)
    there = tuple(test for test in unique if (ROOT / test).exists())
    return Run(there, words, tuple({"OMP_NUM_THREADS": "1", **environment}.items()))


def environment(run: Run) -> None:
    """In a process that has not imported kdkernels."""
    os.environ.update(dict(run.environment))
