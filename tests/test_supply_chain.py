"""The package runs nothing that it reads, and opens no connection: no pickle, no eval, no socket, unless one asks."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kdkernels

PACKAGE = Path(kdkernels.__file__).parent
ROOT = PACKAGE.parent
SOURCES = [*sorted(PACKAGE.rglob("*.py")), ROOT / "setup.py"]
CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "runpy"}
NETWORK = {"socket", "ssl", "http", "urllib", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub"}
PROCESSES = {"subprocess", "pty", "multiprocessing"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"os.system", "os.popen", "torch.hub.load", "torch.hub.load_state_dict_from_url", "yaml.load"}
# who asks: compilers of the native kernels
ALLOWED = {"kdkernels/ops/native_build.py": {"subprocess"}}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unpickles(call: ast.Call, name: str) -> bool:
    said = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in call.keywords}
    if name == "torch.load":
        return said.get("weights_only") is not True
    return name == "np.load" and said.get("allow_pickle", False) is not False


def found(source: str) -> set[str]:
    """What a file imports or calls that could run code from data, reach the network or start a process."""
    suspects = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        suspects |= {name for name in names if name.split(".")[0] in CODE | NETWORK | PROCESSES}
        if isinstance(node, ast.Call):
            name = dotted(node.func).replace("numpy.", "np.")
            if name in BUILTINS | CALLS or unpickles(node, name):
                suspects.add(name)
            if any(k.arg == "shell" for k in node.keywords):
                suspects.add("shell")
    return suspects


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path: Path) -> None:
    assert found(path.read_text()) <= ALLOWED.get(str(path.relative_to(ROOT)), set())


def test_suspects_would_be_found() -> None:
    assert found("import pickle, torch\nfrom urllib.request import urlopen\nx = eval('1')\ntorch.load(p)\n") == {
        "pickle",
        "urllib.request",
        "eval",
        "torch.load",
    }
    assert found("np.load(p, allow_pickle=True)\nyaml.load(f)\nrun(c, shell=True)") == {"np.load", "yaml.load", "shell"}
    assert not found("np.load(p)\ntorch.load(p, weights_only=True)\nmodel.eval()\nre.compile('x')\nyaml.safe_load(f)")


GUARDED = """
import sys
import torch

REFUSED = ("socket.", "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
           "urllib.Request", "http.client.connect", "webbrowser.open")

def refuse(event, args):
    if event.startswith(REFUSED):
        raise PermissionError(f"{event}: {args}")

sys.addaudithook(refuse)
import kdkernels
import kdkernels.training
x, t, y = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4), torch.arange(6) % 4
maps = x.view(6, 4, 1, 1).expand(-1, -1, 2, 2)
losses = [kdkernels.kd_loss(x, t), kdkernels.stkd_loss(x, t, y), kdkernels.sp_loss(x, t), kdkernels.rkd_loss(x, t)]
losses += [kdkernels.amd_loss(maps, maps.detach().square()), kdkernels.mlkd_loss(x, t, y % 3, views=1)]
losses += [kdkernels.linear_kd_loss(kdkernels.Head(x, t), kdkernels.Head(t, t))]
sum(losses).backward()
assert x.grad.isfinite().all()
try:
    import socket
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except PermissionError:
    print("guarded")
"""


def test_imports_and_losses_open_no_connection_and_start_no_process() -> None:
    environment = os.environ | {"KDKERNELS_JIT": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", GUARDED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "guarded\n"
