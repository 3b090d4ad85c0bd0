"""Instructions of sm_90: what they touch, and what of a multiprocessor's units they take."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

Place = tuple[str, ...]  # "gram.cu:54", innermost first: a source line and those that it was inlined at
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
GLOBAL = ("LDG", "STG", "LDGSTS")
SHARED = ("LDS", "STS", "LDSM")
SPECIAL = ("MUFU", "F2F", "F2I", "I2F", "FRND")  # F2FP, which packs two halves, is not among them
ON_FP32 = ("FFMA", "FADD", "FMUL", "IMAD")
FREE = ("NOP", "BSYNC", "BSSY", "WARPSYNC")
UNITS = ("issue slots", "special functions", "fp64", "integer", "loads", "tensor cores")


class Instruction(NamedTuple):
    predicate: str
    opcode: str
    operands: str
    place: Place

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """What a lane loads or stores, 0 for anything else."""
        if self.name not in GLOBAL + SHARED:
            return 0
        if self.name == "LDSM":
            return 4 * int(self.opcode[-1]) if self.opcode[-1] in "24" else 4
        return next((n for part, n in WIDTHS.items() if part in self.opcode.split(".")), 4)

    @property
    def touched(self) -> int:
        """Bytes of global and shared memory: a copy from the one to the other counts twice."""
        return self.bytes * (2 if self.name == "LDGSTS" else 1)

    @property
    def targets(self) -> list[str]:
        return re.findall(r"\.L_\w+", self.operands) if self.name in ("BRA", "BRX") else []

    @property
    def ends(self) -> bool:
        """Nothing falls through it."""
        return (
            self.name in ("BRA", "BRX", "EXIT", "RET")
            and not self.predicate
            and not re.match(r"!?U?P\d", self.operands)
        )

    @property
    def clocks(self) -> dict[str, float]:
        """What a warp's one takes of a multiprocessor's units, sm_90: lanes a clock 16 special, 64 fp64, 64 integer."""
        if self.name in FREE:
            return {}
        used = {"issue slots": 0.25}
        if self.name == "OFF":
            return used
        if self.name in SPECIAL:
            used["special functions"] = 2.0
        elif re.match(r"D(FMA|ADD|MUL|SETP|MNMX)$", self.name):
            used["fp64"] = 0.5
        elif self.bytes:
            used["loads"] = max(1.0, self.bytes / 4) if self.name in GLOBAL else 1.0  # shared: at least
        elif self.name in ("HMMA", "HGMMA"):
            used["tensor cores"] = _products(self.opcode) / (2048 * 0.8)  # mma.sync: 800 of 990 TFLOP/s
        elif self.name not in ON_FP32:
            used["integer"] = 0.5
        return used


def _products(opcode: str) -> float:
    """Multiply-adds of a tensor-core instruction of one warp, in units of half precision's."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)
    if shape:  # of four warps together
        m, n, k = map(int, shape.groups())
        size = m * n * k / 4
    else:
        size = {"16816": 2048, "1688": 1024, "1684": 512}.get(next(iter(re.findall(r"\.(\d{4,5})", opcode)), ""), 2048)
    return size * (2 if "TF32" in opcode else 1)


class Loop(NamedTuple):
    """Of a kernel that ran: how often a warp went through it, and what it did each time."""

    passes: float  # 1 for what is in no loop
    instructions: tuple[Instruction, ...]

    @property
    def global_loads(self) -> Counter[int]:
        """How many loads of which width."""
        return Counter(i.bytes for i in self.instructions if i.name in ("LDG", "LDGSTS"))

    @property
    def products(self) -> int:
        """Instructions for tensor cores."""
        return sum(i.name in ("HMMA", "HGMMA") for i in self.instructions)

    @property
    def clocks(self) -> dict[str, float]:
        total = dict.fromkeys(UNITS, 0.0)
        for i in self.instructions:
            for unit, n in i.clocks.items():
                total[unit] += n * self.passes
        return total
