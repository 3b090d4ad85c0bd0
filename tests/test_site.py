"""What the strict build of the site does not check: the navigation, the docstrings, the search from disk."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
HANDLER = next(p["mkdocstrings"] for p in SITE["plugins"] if "mkdocstrings" in p)["handlers"]["python"]


def leaves(entry: Any) -> Iterator[str]:
    """The pages of the navigation."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from leaves(part)


def test_the_navigation_has_every_page_once() -> None:
    assert sorted(leaves(SITE["nav"])) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


def test_the_search_works_from_disk() -> None:
    """The index is a script, and so is the worker; neither is fetched."""
    assert "offline" in SITE["plugins"]
    assert any(Path(script).name == "iframe-worker.js" for script in SITE["extra"]["polyfills"])
    assert all((DOCS / file).is_file() for file in [*SITE["extra"]["polyfills"], *SITE["extra_css"]])


def test_the_docstrings_of_the_reference_parse(caplog: pytest.LogCaptureFixture) -> None:
    griffe = pytest.importorskip("griffe", reason="comes with the docs extra")
    options = HANDLER["options"]
    package = griffe.load("kdkernels", search_paths=[ROOT])
    shown = [path for page in DOCS.glob("api*.md") for path in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
    assert shown
    with caplog.at_level(logging.WARNING, "griffe"):
        for path in shown:
            found = package[path.removeprefix("kdkernels.")]
            for item in [found, *found.members.values()]:
                if item.docstring:
                    item.docstring.parse(options["docstring_style"], **options["docstring_options"])
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("griffe")]
