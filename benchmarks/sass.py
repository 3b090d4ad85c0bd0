"""What nvcc or Triton made of a kernel: registers, spills, width of loads, and the instructions of its main loops.

A count of machine code, of one pass through a loop: the path that takes most loads of the wanted width, and of those
the one with the fewest instructions. So a switch on the dtype at run time counts as the branch that is taken, and what
is done only sometimes (a division's slow path) does not count.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
FP32 = {"FFMA", "FADD", "FMUL", "IMAD", "FFMA32I"}  # 128 lanes a clock, the rest of the arithmetic 64
SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "FRND"}  # 16 lanes; F2FP, which packs halves, is not among them
FREE = {"NOP", "BSYNC", "BSSY", "WARPSYNC"}


def tools() -> Path | None:
    """The folder of cuobjdump: Triton's, or the toolkit's."""
    try:
        import triton
    except ImportError:
        found = shutil.which("cuobjdump")
        return Path(found).parent if found else None
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return folder if (folder / "cuobjdump").exists() else None


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """What a lane loads or stores, 0 for anything else."""
        if self.name not in ("LDG", "STG", "LDS", "STS", "LDGSTS", "LDSM"):
            return 0
        if self.name == "LDSM":
            return 4 * int(self.opcode[-1]) if self.opcode[-1] in "24" else 4
        return next((n for part, n in WIDTHS.items() if part in self.opcode.split(".")), 4)

    @property
    def jumps_to(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def ends(self) -> bool:
        """Nothing falls through it."""
        return self.name in ("BRA", "EXIT", "BRX", "RET") and not self.predicate and "," not in self.operands


class Cost(NamedTuple):
    """Of one thread on one path: instructions, lanes of each unit, bytes of global and shared memory."""

    path: tuple[Instruction, ...]

    @property
    def instructions(self) -> int:
        return sum(i.name not in FREE for i in self.path)

    def _bytes(self, names: tuple[str, ...], width: int | None = None) -> int:
        return sum(i.bytes for i in self.path if i.name in names and (width is None or i.bytes == width))

    @property
    def global_bytes(self) -> int:
        return self._bytes(("LDG", "STG", "LDGSTS"))

    @property
    def loads(self) -> Counter[int]:
        """How many loads of global memory have which width."""
        return Counter(i.bytes for i in self.path if i.name in ("LDG", "LDGSTS"))

    @property
    def shared_bytes(self) -> int:
        return self._bytes(("LDS", "STS", "LDSM"))

    @property
    def clocks(self) -> dict[str, float]:
        """What a warp takes of a multiprocessor's units, sm_90."""
        used = {"issue slots": self.instructions / 4, "special functions": 0.0, "fp64": 0.0, "integer": 0.0}
        used |= {"loads": 0.0, "tensor cores": 0.0}
        for i in self.path:
            if i.name in SPECIAL:
                used["special functions"] += 2
            elif re.match(r"D(FMA|ADD|MUL|SETP|MNMX)", i.name):
                used["fp64"] += 0.5
            elif i.bytes:
                used["loads"] += max(1, i.bytes / 4)
            elif i.name in ("HMMA", "HGMMA"):
                used["tensor cores"] += products(i.opcode) / (2048 * 0.8)
            elif i.name not in FP32 and i.name not in FREE:
                used["integer"] += 0.5
        return used


def products(opcode: str) -> float:
    """Multiply-adds of a tensor-core instruction of one warp, in units of half precision's."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)
    if shape:  # of four warps together
        m, n, k = map(int, shape.groups())
        size = m * n * k / 4
    else:
        size = {"16816": 2048, "1688": 1024, "1684": 512}.get(next(iter(re.findall(r"\.(\d{4,5})", opcode)), ""), 2048)
    return size * (2 if "TF32" in opcode else 1)


class Kernel:
    """One kernel of a cubin."""

    def __init__(self, name: str, code: list[Instruction], usage: dict[str, int]) -> None:
        self.name, self.code, self.usage = name, code, usage

    @property
    def registers(self) -> int:
        return self.usage["REG"]

    @property
    def spills(self) -> int:
        """Instructions that put registers into local memory or take them back."""
        return sum(i.name in ("LDL", "STL") for i in self.code)

    @cached_property
    def blocks(self) -> dict[int, tuple[list[Instruction], list[int]]]:
        """Instructions and successors by the address of the first."""
        starts = {self.code[0].address} if self.code else set()
        for a, b in zip(self.code, self.code[1:], strict=False):
            if a.jumps_to is not None:
                starts |= {a.jumps_to, b.address}
            elif a.name in ("EXIT", "BRX", "RET"):
                starts.add(b.address)
        parts: dict[int, list[Instruction]] = {}
        for i in self.code:
            if i.address in starts:
                parts[i.address] = current = []
            current.append(i)
        order = sorted(parts)
        following = dict(zip(order, order[1:], strict=False))
        blocks: dict[int, tuple[list[Instruction], list[int]]] = {}
        reached = set()
        for start, part in parts.items():
            last, to = part[-1], []
            if last.jumps_to is not None:
                to.append(last.jumps_to)
            if not last.ends and start in following:
                to.append(following[start])
            blocks[start] = part, [t for t in to if t in parts]
            reached |= set(to)
        for start, (part, to) in blocks.items():  # a table of jumps: to what nothing else reaches, close behind it
            if part[-1].name == "BRX":
                to += [s for s in order if s not in reached and start < s < start + 16 * 200]
        return blocks

    @cached_property
    def loops(self) -> list[Cost]:
        """All of them, one pass each, where an inner loop counts as one pass of it."""
        return [self._pass(head, tail, width=None) for head, tail in self._back_edges()]

    def _back_edges(self) -> list[tuple[int, int]]:
        return [(to, start) for start, (_, tos) in self.blocks.items() for to in tos if to <= start]

    def _body(self, head: int, tail: int) -> set[int]:
        before: dict[int, list[int]] = {}
        for start, (_, tos) in self.blocks.items():
            for to in tos:
                before.setdefault(to, []).append(start)
        body, todo = {head, tail}, [tail]
        while todo:
            at = todo.pop()
            for b in before.get(at, []) if at != head else []:
                if b not in body:
                    body.add(b)
                    todo.append(b)
        return body

    def main_loops(self, width: int) -> list[Cost]:
        """The innermost loops with loads of elements of ``width`` bytes; of a loop and its remainder the wider one."""
        edges = self._back_edges()
        bodies = {e: self._body(*e) for e in edges}
        touching = [e for e in edges if any(i.name in ("LDG", "LDGSTS") for b in bodies[e] for i in self.blocks[b][0])]
        inner = [e for e in touching if not any(bodies[o] < bodies[e] for o in touching)]
        return [c for e in inner if (c := self._pass(*e, width=width)).global_bytes]

    def once(self, width: int) -> Cost:
        """From the start to the end, each loop once."""
        ends = [s for s, (part, _) in self.blocks.items() if part[-1].name == "EXIT" and not part[-1].predicate]
        return max(
            (self._pass(self.code[0].address, end, width=width, body=set(self.blocks)) for end in ends),
            key=lambda c: (c.global_bytes, -c.instructions),
        )

    def _pass(self, head: int, tail: int, width: int | None, body: set[int] | None = None) -> Cost:
        inside = body or self._body(head, tail)

        def worth(start: int) -> tuple[int, int]:
            part = self.blocks[start][0]
            loads = [i for i in part if i.name in ("LDG", "LDGSTS", "STG", "HMMA", "HGMMA")]
            wrong = sum(i.bytes in (1, 2, 4, 8) and i.bytes != width and not i.predicate for i in loads)
            right = sum(not i.bytes or i.bytes == width or i.bytes == 16 for i in loads)
            return right - (100 * wrong if width else 0), -len(part)

        best: dict[int, tuple[tuple[int, int], list[int]]] = {head: (worth(head), [head])}
        for start in sorted(inside):  # code is laid out in order but for the slow paths behind its end
            if start not in best:
                continue
            value, path = best[start]
            for to in self.blocks[start][1]:
                if to <= start or to not in inside:
                    continue
                gain = worth(to)
                new = (value[0] + gain[0], value[1] + gain[1])
                if to not in best or new > best[to][0]:
                    best[to] = new, [*path, to]
        path = best[tail][1] if tail in best else [head]
        return Cost(tuple(i for start in path for i in self.blocks[start][0]))


def kernels(cubin: Path) -> dict[str, Kernel]:
    """By their names as the compiler mangles them."""
    folder = tools()
    if folder is None:
        raise RuntimeError("no cuobjdump: it comes with Triton and with CUDA's toolkit")

    def dump(option: str) -> str:
        command = [str(folder / "cuobjdump"), option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
        for name, text in re.findall(r"Function (\S+):\s*\n(.*)", dump("--dump-resource-usage"))
    }
    found = {}
    for part in dump("-sass").split("Function : ")[1:]:
        name = part.split()[0]
        code = [
            Instruction(int(address, 16), predicate, opcode, operands)
            for address, predicate, opcode, operands in re.findall(
                r"/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", part
            )
        ]
        found[name] = Kernel(name, code, usage[name])
    return found


def occupancy(registers: int, threads: int, shared: int) -> float:
    """Share of a multiprocessor's 64 warps that can be resident, sm_90."""
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = 227 * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64
