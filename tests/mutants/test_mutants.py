"""What is changed, and which tests each changed file has to pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import changes, equivalent, matters

CPP = """\
#include <cmath>  // a + b
template <int N>
int64_t f(int64_t n) {
  if (n < 0) return min(n, 2);
  sum += 0.5f * n + 0.0f;
}
"""
PYTHON = """\
def f(x: int, scale: float = 0.5) -> int:
    if not x or x is None:
        raise ValueError(f"{x + 1}")
    x -= 1
    return -(x) + 2
"""


def _changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> set[tuple[str, str]]:
    monkeypatch.setattr(changes, "ROOT", tmp_path)
    (tmp_path / name).write_text(text)
    return {(m.old, m.new) for m in changes.mutants(tmp_path / name)}


def test_changes_of_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    condition, statement = "if (n < 0) return min(n, 2);", "sum += 0.5f * n + 0.0f;"
    assert _changed(tmp_path, monkeypatch, "f.h", CPP) == {
        (condition, "if (n <= 0) return min(n, 2);"),
        (condition, "if (n < 1) return min(n, 2);"),
        (condition, "if (n < 0) return max(n, 2);"),
        (condition, "if (n < 0) return min(n, 3);"),
        (condition, "if (false && n < 0) return min(n, 2);"),
        (condition, "if (true || n < 0) return min(n, 2);"),
        (statement, "sum -= 0.5f * n + 0.0f;"),
        (statement, "sum += 0.5f / n + 0.0f;"),
        (statement, "sum += 0.5f * n - 0.0f;"),
        (statement, "sum += 1.0f * n + 0.0f;"),
        (statement, "sum += 0.5f * n + 1.0f;"),
        (statement, ";"),
    }


def test_changes_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature, condition = "def f(x: int, scale: float = 0.5) -> int:", "if not x or x is None:"
    assert _changed(tmp_path, monkeypatch, "f.py", PYTHON) == {
        (signature, "def f(x: int, scale: float = 1.0) -> int:"),
        (condition, "if not (not x or x is None):"),
        (condition, "if x or x is None:"),
        (condition, "if not x and x is None:"),
        (condition, "if not x or x is not None:"),
        ("x -= 1", "pass"),
        ("x -= 1", "x -= 2"),
        ("return -(x) + 2", "return (x) + 2"),
        ("return -(x) + 2", "return -(x) - 2"),
        ("return -(x) + 2", "return -(x) + 3"),
    }


def test_every_file_has_its_tests() -> None:
    for path in matters.files():
        assert matters.run(str(path.relative_to(changes.ROOT))).tests, path


def test_reasons_are_for_all_changes_to_a_line_or_for_one() -> None:
    entries = [equivalent.Entry("a.h: x + 1; => *", "of no matter"), equivalent.Entry("a.h: y => y + 1", "the same")]
    assert equivalent.reason("a.h: x + 1; => x + 2;", entries) == "of no matter"
    assert equivalent.reason("a.h: y => y + 1", entries) == "the same"
    assert not equivalent.reason("a.h: y => y + 2", entries)
    assert all(entry.reason for entry in equivalent.read())
