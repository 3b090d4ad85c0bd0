"""CUDA C++ to C++: the few constructs that a C++ compiler does not know become calls of the executor.

Line numbers stay, so that a fault found while a kernel runs names the line of csrc.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"

_TEMPLATE = r"(?:<(?:[^<>;{}]|<[^<>;{}]*>)*>)?"
_TYPE = rf"(?:(?:const|volatile|unsigned|signed|long)\s+)*[\w:]+{_TEMPLATE}"
_ALIGNED = r"(?:(?:alignas|__align__)\((\w+)\)\s*)?"
_LAUNCH = re.compile(rf"([A-Za-z_][\w:]*{_TEMPLATE})\s*<<<(.*?)>>>(?=\s*\()", re.S)
_DYNAMIC = re.compile(rf"extern\s+__shared__\s+{_ALIGNED}({_TYPE})\s+(\w+)\[\]\s*;")
_STATIC = re.compile(rf"__shared__\s+{_ALIGNED}({_TYPE}[\s*]+)([^;=]+);")
_CONSTANT = re.compile(rf"const\s+__grid_constant__\s+([\w:]+{_TEMPLATE})\s+(\w+)")
_UNROLL = re.compile(r"^[ \t]*#pragma unroll[^\n]*", re.M)


def _static(match: re.Match[str]) -> str:
    alignment, kind, variables = match.groups()
    out = []
    for variable in re.findall(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)(?:,|$)", variables):
        name, dimensions = variable
        out.append(f"CUDA_ON_CPU_SHARED({kind.strip()}, {name}, {dimensions.strip()}, {alignment or 1});")
    return " ".join(out)


def _dynamic(match: re.Match[str]) -> str:
    alignment, kind, name = match.groups()
    return f"{kind}* const {name} = static_cast<{kind}*>(cuda_on_cpu::dynamic_shared({alignment or 1}));"


def _launch(match: re.Match[str]) -> str:
    kernel, configuration = match.groups()
    name = kernel.split("<")[0].split("::")[-1]
    lines = "\n" * (match[0].count("\n") - configuration.count("\n"))
    return f'{lines}cuda_on_cpu::Launcher("{name}", &{kernel}, cuda_on_cpu::Configuration({configuration}))'


def _constant(match: re.Match[str]) -> str:
    kind, name = match.groups()
    return f"const {kind}& {name}"  # one copy per launch, as on the GPU, and not one per thread


def _replace(pattern: re.Pattern[str], by: Callable[[re.Match[str]], str], text: str) -> str:
    """As many lines as before."""

    def replaced(match: re.Match[str]) -> str:
        new = by(match)
        return new + "\n" * (match[0].count("\n") - new.count("\n"))

    return pattern.sub(replaced, text)


def to_cpp(text: str, path: str) -> str:
    """The source at ``path`` (as messages shall name it) as C++."""
    text = _UNROLL.sub("", text)
    text = _replace(_DYNAMIC, _dynamic, text)
    text = _replace(_STATIC, _static, text)
    text = _replace(_CONSTANT, _constant, text)
    text = _replace(_LAUNCH, _launch, text)
    return f'#line 1 "{path}"\n{text}'


def csrc() -> dict[str, str]:
    """The files of csrc/ by name."""
    return {
        path.name: path.read_text() for path in sorted(CSRC.iterdir()) if path.suffix in (".h", ".cuh", ".cu", ".cpp")
    }


def included(text: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Those of the headers that a source includes, directly or not: only a change to them compiles it anew."""
    found: dict[str, str] = {}
    texts = [text]
    for text in texts:  # which grows
        new = [n for n in re.findall(r'#include "(.*)"', text) if n in headers and n not in found]
        found |= {n: headers[n] for n in new}
        texts += [headers[n] for n in new]
    return found
