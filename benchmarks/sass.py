"""What nvcc or Triton made of a kernel: registers, width of loads, loops, and what a pass through them costs."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from pathlib import Path

from .instructions import GLOBAL, Instruction, Loop, Place


def tools() -> Path | None:
    """The folder of nvdisasm and cuobjdump: Triton's, or the toolkit's."""
    try:
        import triton
    except ImportError:
        found = shutil.which("nvdisasm")
        return Path(found).parent if found else None
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return folder if (folder / "nvdisasm").exists() else None


class Kernel:
    """One kernel of a cubin: blocks of instructions, numbered in order, and where each goes on."""

    def __init__(self, name: str, usage: dict[str, int], lines: Iterable[str]) -> None:
        self.name, self.usage = name, usage
        self.blocks: list[list[Instruction]] = [[]]
        label_at: dict[str, int] = {}
        place: list[str] = []
        fresh = True
        for line in lines:
            if found := re.match(r'\s*//## File "(.*?)", line (\d+)', line):
                place = ([] if fresh else place) + [f"{Path(found[1]).name}:{found[2]}"]
                fresh = False
            elif found := re.match(r"(\.L_\w+):", line):
                if self.blocks[-1]:
                    self.blocks.append([])
                label_at[found[1]] = len(self.blocks) - 1
            elif found := re.match(r"\s+/\*[0-9a-f]{4,6}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
                fresh = True
                i = Instruction(found[1] or "", found[2], found[3], tuple(place))
                self.blocks[-1].append(i)
                if i.name in ("BRA", "BRX", "EXIT", "RET"):
                    self.blocks.append([])
        while self.blocks and not self.blocks[-1]:
            self.blocks.pop()
        self.next: list[list[int]] = []
        for at, block in enumerate(self.blocks):
            to = [label_at[t] for t in block[-1].targets if t in label_at] if block else []
            if at + 1 < len(self.blocks) and not (block and block[-1].ends):
                to.append(at + 1)
            self.next.append([t for t in to if t < len(self.blocks)])

    @property
    def registers(self) -> int:
        return self.usage["REG"]

    @property
    def local_accesses(self) -> int:
        """Loads and stores of local memory: spilt registers, or an array whose index the compiler does not know."""
        return sum(i.name in ("LDL", "STL") for block in self.blocks for i in block)

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """The blocks of each loop by its first one; of several ways back to it the union."""
        before: dict[int, list[int]] = {}
        for at, tos in enumerate(self.next):
            for to in tos:
                before.setdefault(to, []).append(at)
        loops: dict[int, set[int]] = {}
        for tail, tos in enumerate(self.next):
            for head in tos:
                if head > tail:
                    continue
                body, todo = {head, tail}, [tail] if tail != head else []
                while todo:
                    for b in before.get(todo.pop(), []):
                        if b not in body and b > head:
                            body.add(b)
                            todo.append(b)
                if head != tail or len(self.blocks[head]) > 1:  # the last instruction of all jumps to itself
                    loops[head] = loops.get(head, set()) | body
        return loops

    def executed(self, bytes_at: dict[Place, float], warps: float) -> list[Loop]:
        """What ran, from the bytes that all lanes together touched at each place: loops, and all else once per warp."""
        bytes_at = self._aligned(bytes_at)
        inner = {
            at: min((len(body), head) for head, body in self.loops.items() if at in body)[1] for at in self._looped
        }
        paths = {head: self._path(head, body, bytes_at) for head, body in self.loops.items()}
        own = {
            head: [i for at in path if inner[at] == head for i in self._ran(at, bytes_at)]
            for head, path in paths.items()
        }
        passes = dict.fromkeys(own, 0.0)
        for place, total in bytes_at.items():
            triton = bool(place) and ".py:" in place[0]  # its interpreter sees global memory alone
            of_loop = {
                head: sum(
                    i.bytes if triton else i.touched
                    for i in part
                    if i.place == place and (i.name in GLOBAL or not triton)
                )
                for head, part in own.items()
            }
            heads = [head for head, n in of_loop.items() if n]
            if heads and not triton:  # of a loop and its remainder; Triton makes none
                heads = [max(heads, key=lambda h: of_loop[h])]
            for head in heads:
                passes[head] = max(passes[head], total / len(heads) / of_loop[head] / 32)
        rest = self._path(0, set(range(len(self.blocks))), bytes_at)
        found = [Loop(n, tuple(own[head])) for head, n in passes.items() if n]
        return [*found, Loop(warps, tuple(i for at in rest if at not in self._looped for i in self._ran(at, bytes_at)))]

    @cached_property
    def _looped(self) -> set[int]:
        return set().union(*self.loops.values()) if self.loops else set()

    def matched(self, bytes_at: dict[Place, float]) -> float:
        """The share of the bytes whose place is one in the machine code too."""
        known = {i.place for block in self.blocks for i in block if i.bytes}
        bytes_at = self._aligned(bytes_at)
        total = sum(bytes_at.values())
        return sum(n for place, n in bytes_at.items() if place in known) / total if total else 1.0

    def _ran(self, at: int, bytes_at: dict[Place, float]) -> list[Instruction]:
        """The instructions of a block; what its predicate switched off is issued and does nothing."""
        off = {i.predicate for i in self.blocks[at] if i.bytes and i.predicate and i.place not in bytes_at}
        return [i._replace(opcode="OFF") if i.predicate in off else i for i in self.blocks[at]]

    def _aligned(self, bytes_at: dict[Place, float]) -> dict[Place, float]:
        """The same by this code's own places: of a statement of several lines compilers name different ones."""
        known = {i.place for block in self.blocks for i in block if i.bytes and i.place}
        found: dict[Place, float] = {}
        for place, n in bytes_at.items():
            near = place
            if place and place not in known:
                near = place[:1] if place[:1] in known else place  # Triton does not tell what was inlined where
                near = min((p for p in known if _apart(p, place) < 20), key=lambda p: _apart(p, place), default=near)
            found[near] = found.get(near, 0.0) + n
        return found

    def _path(self, head: int, body: Collection[int], bytes_at: dict[Place, float]) -> list[int]:
        """The way through that touches what ran and nothing else, and of those the one with the fewest instructions."""

        def worth(at: int) -> tuple[int, int]:
            touched = [i for i in self.blocks[at] if i.bytes or i.name in ("HMMA", "HGMMA")]
            ran = [not i.bytes or i.place in bytes_at for i in touched]
            idle = sum(not r and not i.predicate for r, i in zip(ran, touched, strict=True))
            return sum(ran) - 100 * idle, -len(self.blocks[at])

        best: dict[int, tuple[tuple[int, int], list[int]]] = {head: (worth(head), [head])}
        ends = []
        for at in sorted(body):
            if at not in best:
                continue
            value, path = best[at]
            if head in self.next[at] or (len(body) == len(self.blocks) and not self.next[at]):
                ends.append((value, path))
            for to in self.next[at]:
                if to <= at or to not in body:
                    continue
                gain = worth(to)
                new = (value[0] + gain[0], value[1] + gain[1])
                if to not in best or new > best[to][0]:
                    best[to] = new, [*path, to]
        return max(ends)[1] if ends else [head]


def _apart(a: Place, b: Place) -> float:
    """By how many lines two places of the same files differ, those of the calls first of all."""
    one, other = ([line.split(":") for line in place] for place in (a, b))
    if [file for file, _ in one] != [file for file, _ in other]:
        return math.inf
    off = [abs(int(x) - int(y)) for (_, x), (_, y) in zip(one, other, strict=True)]
    return min(off[0], 15) + 5 * sum(off[1:])


def kernels(cubin: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Kernel]:
    """Those wanted, by their names as the compiler mangles them."""
    folder = tools()
    if folder is None:
        raise RuntimeError("no nvdisasm: it comes with Triton and with CUDA's toolkit")

    def run(*command: str) -> str:
        return subprocess.run([folder / command[0], *command[1:]], capture_output=True, text=True, check=True).stdout

    usage = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
        for name, text in re.findall(r"Function (\S+):\s*\n(.*)", run("cuobjdump", "--dump-resource-usage", str(cubin)))
    }
    found = {}
    for part in run("nvdisasm", "-gi", "-c", str(cubin)).split("\t.section\t.text.")[1:]:
        name = part.partition(",")[0].strip('"')
        if wanted(name):
            found[name] = Kernel(name, usage[name], part.partition("\t.section\t")[0].splitlines())
    return found
