"""The README and the pages of docs/: code runs, commands, links and names exist, nothing public is left out."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from forks import Fork
from torch.autograd import forward_ad

import kdkernels.compat.kd_zoo
import kdkernels.compat.liger
import kdkernels.compat.mdistiller
import kdkernels.compat.mlld
import kdkernels.compat.repdistiller
import kdkernels.compat.torchdistill.features
import kdkernels.compat.torchdistill.logits
import kdkernels.compat.torchtune
import kdkernels.compat.trl
import kdkernels.integrations.hf
import kdkernels.integrations.lightning
import kdkernels.training
from benchmarks import report
from kdkernels import cli, doctor

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").rglob("*.md"))]
COLUMN = 88  # characters of code that the site shows in full: docs/assets/column.css
QUIET = {"__version__", "METHODS"}  # names that speak for themselves

# Blocks that cannot run here, by page: ```python title="not run: why", for all to see. Adding one is a decision.
NOT_RUN = {
    "docs/compat.md": ["python: not run: needs RepDistiller", "python: not run: needs mdistiller"],
    "docs/linear-kd.md": ["python: not run: needs several processes"],
    "docs/torchdistill.md": ["bash: not run: needs torchdistill"] * 2 + ["python: not run: needs torchdistill"],
}


class Block(NamedTuple):
    language: str
    title: str
    code: str


def blocks(page: Path) -> list[Block]:
    found = re.finditer(r"^( *)```(?: {\.)?(\w*)([^\n]*)\n(.*?)^\1```$", page.read_text(), re.S | re.M)
    return [Block(m[2], "".join(re.findall(r'title="(.*?)"', m[3])), textwrap.dedent(m[4])) for m in found]


def running(page: Path, language: str) -> list[str]:
    found = [b for b in blocks(page) if b.language == language and not b.title.startswith("not run")]
    return [b.code for b in found if not b.code.startswith("--8<--")]  # a file of the package has its own tests


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun sets for its only process."""
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(variable, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("page", [p for p in PAGES if running(p, "python")], ids=name)
def test_the_python_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a block writes
    names: dict[str, object] = {}
    for number, code in enumerate(running(page, "python"), 1):
        exec(compile(code, f"{name(page)}, block {number}", "exec"), names)
    loss = names.get("loss", torch.zeros(()))
    assert isinstance(loss, torch.Tensor)
    assert loss.isfinite()


def test_blocks_that_do_not_run_are_known() -> None:
    found = {name(p): sorted(f"{b.language}: {b.title}" for b in blocks(p) if "not run" in b.title) for p in PAGES}
    assert {page: titles for page, titles in found.items() if titles} == NOT_RUN


def test_every_block_says_what_it_is() -> None:
    """A fence of another language, or of none, would escape the tests of this file."""
    known = {"python", "bash", "text", "yaml", "diff"}
    assert not [(name(p), b.language, b.code[:40]) for p in PAGES for b in blocks(p) if b.language not in known]


def test_code_fits_its_column() -> None:
    """A longer line is cut at the right, where readers do not see that it goes on."""
    assert not [(name(p), line) for p in PAGES for b in blocks(p) for line in b.code.splitlines() if len(line) > COLUMN]


def test_the_opening_lines_of_the_readme_are_in_its_first_example() -> None:
    opening = re.findall(r"^\d\. `(.*)`$", README.read_text(), re.M)
    assert len(opening) == 3
    assert set(opening) <= set(running(README, "python")[0].splitlines())


def test_the_diffs_of_adding_apply_and_work(tmp_path: Path) -> None:
    if (git := shutil.which("git")) is None:
        pytest.skip("git applies the diffs")
    shutil.copytree(ROOT / "kdkernels", tmp_path / "kdkernels", ignore=shutil.ignore_patterns("__pycache__"))
    diffs = running(ROOT / "docs/adding.md", "diff")
    assert len(diffs) == 3
    for diff in diffs:
        subprocess.run([git, "apply", "--unidiff-zero", "-C1", "-"], input=diff, cwd=tmp_path, text=True, check=True)
    code = f"import os, sys, pytest; os.chdir({str(tmp_path)!r}); sys.path.insert(0, '')\n"
    code += "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests']))"
    process = Fork(code, {**os.environ, "KDKERNELS_JIT": "0", "PYTHONPATH": str(tmp_path)})
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "passed" in output


def test_modules_in_configurations_exist() -> None:
    found = [code for p in PAGES for code in running(p, "yaml")]
    names = re.findall(r"['\"](kdkernels\.[\w.]+)['\"]", "\n".join(found))
    assert names
    assert all(importlib.import_module(n) for n in names)


def commands() -> list[tuple[str, str]]:
    lines = [(name(p), line) for p in PAGES for code in running(p, "bash") for line in code.splitlines()]
    return [(page, line) for page, line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda x: x.replace("\\", ""))
def test_commands_exist_with_their_options(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        assert words.pop(0).partition("=")[0] in environment_variables()
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] == "kdkernels":
        cli.parser().parse_args(words[1:])  # exits with 2, which fails, on an option that does not exist
    elif words[:3] == ["python", "-m", "benchmarks.report"]:
        report.parser().parse_args(words[3:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[:2] == ["pip", "install"]:
        extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
        assert set(re.findall(r"\w+", "".join(re.findall(r"\[(.*?)\]", line)))) <= extras
    else:
        assert words[0] == "python", f"{page}: teach this test what {words[0]!r} is"
        assert (ROOT / words[1]).is_file()


def environment_variables() -> set[str]:
    """Those that the code and its tests' executor read."""
    sources = [ROOT / "setup.py", *(ROOT / "kdkernels").rglob("*.py"), *(ROOT / "tests/cuda_on_cpu").glob("*.py")]
    pattern = r"""(?:environ(?:\.get)?|getenv)\s*[\[(]\s*["'](\w+)["']"""
    read = {variable for path in sources for variable in re.findall(pattern, path.read_text())}
    return read | set(doctor.VARIABLES)


def test_every_environment_variable_is_in_the_table() -> None:
    rows = [row for row in (ROOT / "docs/backends.md").read_text().splitlines() if row.startswith("| `")]
    table = {variable for row in rows for variable in re.findall(r"`([A-Z_]{3,})`", row.split("|")[1])}
    assert table == environment_variables()


def test_every_option_of_the_command_line_is_explained() -> None:
    (subparsers,) = (a for a in cli.parser()._actions if isinstance(a.choices, dict))
    page = (ROOT / "docs/command-line.md").read_text()
    for command, parser in subparsers.choices.items():
        assert f"kdkernels {command}" in page
        assert not set(re.findall(r"--[\w-]+", parser.format_help())) - {"--help"} - set(re.findall(r"--[\w-]+", page))


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub; what the site makes of it is checked by its strict build."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M)
    headings = {slug(h) for h in re.findall(r"^#+ (.*)$", text, re.M)}
    return headings | set(re.findall(r"^::: (\S+)$", text, re.M))


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_no_dead_links(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def text_of(*pages: Path) -> str:
    return "\n".join(p.read_text() for p in pages)


def test_every_public_name_is_found_by_a_search() -> None:
    readme, docs = README.read_text(), text_of(*(p for p in PAGES if p != README and not p.stem.startswith("api")))
    public = set(kdkernels.__all__) - QUIET
    assert not [n for n in public - {"BackendError"} if not re.search(rf"\b{n}\b", readme)]
    assert not [n for n in public if not re.search(rf"\b{n}\b", docs)]
    trainer = set(kdkernels.training.__all__) - QUIET - {"Batch", "Outputs", "DistillationOutput"}
    assert not [n for n in trainer if not re.search(rf"\b{n}\b", docs)]


PRESETS = [kdkernels.compat.kd_zoo, kdkernels.compat.mdistiller, kdkernels.compat.mlld, kdkernels.compat.repdistiller]
PRESETS += [kdkernels.compat.torchdistill.features, kdkernels.compat.torchdistill.logits]
PRESETS += [kdkernels.integrations.hf, kdkernels.integrations.lightning]
PRESETS += [kdkernels.compat.trl, kdkernels.compat.liger, kdkernels.compat.torchtune]


@pytest.mark.parametrize("module", PRESETS, ids=lambda module: module.__name__)
def test_every_preset_and_integration_is_documented(module: ModuleType) -> None:
    own = [x for x in vars(module).values() if getattr(x, "__module__", None) == module.__name__]
    public = [x for x in own if not x.__name__.startswith("_") and x.__name__ != "register"]
    assert public
    page = (ROOT / "docs" / ("compat.md" if "compat" in module.__name__ else "integrations.md")).read_text()
    shown = reference("api-compat.md")
    assert not [x.__name__ for x in public if not re.search(rf"\b{x.__name__}\b", page) or x not in shown]
    assert all(inspect.getdoc(x) for x in public)


def reference(page: str) -> list[object]:
    """The objects that a page of the reference shows."""
    found = []
    for path in re.findall(r"^::: (\S+)$", (ROOT / "docs" / page).read_text(), re.M):
        module, _, attribute = path.rpartition(".")
        found.append(getattr(importlib.import_module(module), attribute))
    return found


@pytest.mark.parametrize(("page", "package"), [("api.md", kdkernels), ("api-training.md", kdkernels.training)])
def test_the_reference_is_complete_and_has_docstrings(page: str, package: object) -> None:
    shown = reference(page)
    assert not [n for n in set(package.__all__) - QUIET if getattr(package, n) not in shown]
    assert not [x for x in shown if not inspect.getdoc(x)]


X, Y = torch.randn(6, 10), torch.randn(6, 10)
LABELS = torch.tensor([0, 1, 2, 3, 4, 10])


def second_derivative() -> None:
    x = X.clone().requires_grad_()
    torch.autograd.grad(kdkernels.kd_loss(x, Y), x, create_graph=True)


def forward_mode() -> None:
    with forward_ad.dual_level():
        kdkernels.kd_loss(forward_ad.make_dual(X, Y), Y)


def on(backend: str) -> None:
    with kdkernels.use_backend(backend):
        kdkernels.kd_loss(X, Y)


# what troubleshooting.md quotes, and how to get it
QUOTED = {
    "softmax_kl has no second derivative: take gradients without create_graph=True": second_derivative,
    "softmax_kl has no forward-mode derivative (jvp, jacfwd)": forward_mode,
    "In order to use an autograd.Function with functorch transforms": lambda: torch.func.grad(
        lambda x: kdkernels.kd_loss(x, Y)
    )(X),
    "target has label 10; valid are 0..9, and -100 to ignore": lambda: kdkernels.stkd_loss(X, Y, LABELS),
    "must be one of 'auto', 'native', 'triton', 'reference', got 'cuda'": lambda: on("cuda"),
    "amd_loss: student and teacher must be (B, C, H, W) with the same H and W": lambda: kdkernels.amd_loss(
        torch.rand(1, 1, 2, 2), torch.rand(1, 1, 4, 4)
    ),
    "student and teacher must have the same width (project the student)": lambda: kdkernels.alignment_loss(X, Y[:, :9]),
    "needs as many student as teacher layers": lambda: kdkernels.sp_loss([X], [Y, Y]),
    "views must be 1 or more and divide the number of rows": lambda: kdkernels.correlation_loss(X, Y),
    "no stages (layer1, stages.0, encoder.layer.0, ...) found in": lambda: kdkernels.training.stage_names(
        torch.nn.Linear(1, 1)
    ),
    "backend 'triton' was asked for by name and cannot run softmax_kl": lambda: on("triton"),
}


@pytest.mark.parametrize("message", QUOTED)
def test_errors_that_troubleshooting_quotes_are_raised(message: str) -> None:
    assert message in " ".join((ROOT / "docs/troubleshooting.md").read_text().split())
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=re.escape(message)):
        QUOTED[message]()
