"""The package uses public names of PyTorch, none of its attributes and modules that begin with "_", but one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kdkernels

# Whether a backward pass is the last one, so that gradients that are already there can be handed on instead of copied:
# AOTAutograd asks the same. Without the name they are copied; test_linear_kd.py takes gradients once and twice.
ALLOWED = {"torch._C._autograd", "torch._C"}
SOURCES = sorted(Path(kdkernels.__file__).parent.rglob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def dotted(node: ast.expr) -> list[str]:
    """a.b.c as its parts; nothing for anything else."""
    if isinstance(node, ast.Attribute):
        parts = dotted(node.value)
        return [*parts, node.attr] if parts else []
    return [node.id] if isinstance(node, ast.Name) else []


def private_torch_names(source: str) -> set[str]:
    """What a file imports from torch or reaches through it that begins with an underscore."""
    tree, modules, found = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                modules[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
                found |= {name.name} if name.name.split(".")[0] == "torch" else set()
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
            for name in node.names:
                modules[name.asname or name.name] = f"{node.module}.{name.name}"
                found.add(f"{node.module}.{name.name}")
    for node in ast.walk(tree):
        parts = dotted(node) if isinstance(node, ast.Attribute) else []
        if parts and modules.get(parts[0], "").split(".")[0] == "torch":
            found.add(".".join([modules[parts[0]], *parts[1:]]))
    return {name for name in found if any(is_private(part) for part in name.split("."))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parents[1])))
def test_no_private_name_of_torch(path: Path) -> None:
    assert private_torch_names(path.read_text()) <= (ALLOWED if path.name == "library.py" else set())


def test_private_names_would_be_found() -> None:
    source = (
        "import torch\nimport torch.distributed as dist\nfrom torch import nn\nfrom torch._ops import OpOverload\n"
        "torch._C.x(torch.ops.kdkernels.f, dist._get(), nn.Module.__init__, nn.functional._pad)\n"
    )
    assert private_torch_names(source) == {
        "torch._ops.OpOverload",
        "torch._C",
        "torch._C.x",
        "torch.distributed._get",
        "torch.nn.functional._pad",
    }
