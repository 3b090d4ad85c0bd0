"""What losses keep and what they take: python tests/resources.py steps <n> [loss ...], or: peaks [loss ...].

steps    n small steps of each loss: resident memory, file handles and threads after them, less those before
peaks    the peak of one step of each loss, forward and backward, beside its inputs, in numbers of float32

Of a process of its own, which reads them in /proc; the package must be installed or in PYTHONPATH. With
MALLOC_MMAP_THRESHOLD_=65536 freed tensors go back at once. The losses of the steps are those of test_recompilation.py.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import isolation  # noqa: F401  before kdkernels, whose native library it keeps
import torch
from test_recompilation import LOSSES as STEPS
from torch import Tensor

import kdkernels
from kdkernels import Head, linear_kd_loss

LIBC = ctypes.CDLL("libc.so.6")


def memory(what: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    found = re.search(what + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def held() -> tuple[int, int, int]:
    """Resident bytes, file handles, threads."""
    gc.collect()
    LIBC.malloc_trim(0)
    return memory("VmRSS"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def steps(name: str, count: int) -> None:
    loss = STEPS[name]
    student, teacher = torch.randn(8, 12, requires_grad=True), torch.randn(8, 12)

    def run(times: int) -> None:
        for _ in range(times):
            loss(student, teacher).sum().backward()
            student.grad = None

    run(count // 10)
    before = held()
    run(count)
    print(name, *(b - a for a, b in zip(before, held(), strict=True)), sep="\t", flush=True)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def labels(n: int, classes: int) -> Tensor:
    return torch.arange(n) % classes


N, C = 4096, 1000  # logits
B, D = 1024, 3000  # features
MAP = 32, 64, 56, 56  # feature maps: samples, channels, height, width
Loss = Callable[[Tensor, Tensor], Tensor]
LOGITS: dict[str, Loss] = {
    "kd_loss": kdkernels.kd_loss,
    "stkd_loss": lambda s, t: kdkernels.stkd_loss(s, t, labels(N, C)),
    "nkd_loss": lambda s, t: kdkernels.nkd_loss(s, t, labels(N, C)),
    "dist_loss": kdkernels.dist_loss,
    "mlld_loss": lambda s, t: kdkernels.mlld_loss(s, t, temperatures=[4.0], strong_temperatures=[]),
}
FEATURES: dict[str, Loss] = {
    "sp_loss": kdkernels.sp_loss,
    "rkd_loss": kdkernels.rkd_loss,
    "irg_loss": kdkernels.irg_loss,
    "pkt_loss": kdkernels.pkt_loss,
    "cc_loss": kdkernels.cc_loss,
    "neighbour_correlation_loss": kdkernels.neighbour_correlation_loss,
    "correlation_loss": lambda s, t: kdkernels.correlation_loss(s, t, views=1),
    "alignment_loss": kdkernels.alignment_loss,
    "supervised_contrastive_loss": lambda s, t: kdkernels.supervised_contrastive_loss(s, t, labels(B, 10)),
    "mlkd_loss": lambda s, t: kdkernels.mlkd_loss(s, t, labels(B, 10), views=1),
}
MAPS: dict[str, Loss] = {
    "cwd_loss": kdkernels.cwd_loss,
    "at_loss": kdkernels.at_loss,
    "ft_loss": kdkernels.ft_loss,
    "amd_loss": kdkernels.amd_loss,
    "nst_loss": kdkernels.nst_loss,
    "ickd_loss": kdkernels.ickd_loss,
    "fsp_loss": lambda s, t: kdkernels.fsp_loss([s, another(*MAP)], [t, t]),
}


OTHERS: dict[tuple[int, ...], Tensor] = {}  # more leaves, the same in every step


def another(*shape: int) -> Tensor:
    if shape not in OTHERS:
        OTHERS[shape] = leaf(*shape)
    return OTHERS[shape]


def corsd(s: Tensor, t: Tensor) -> Tensor:
    relations, y = torch.full((4, N // 4), 0.5), labels(N // 4, C)
    return kdkernels.corsd_loss(relations, relations, s.view(4, -1, C), t.view(4, -1, C), y, y)


def linear(s: Tensor, t: Tensor) -> Tensor:
    weight = another(32000, 64)
    return linear_kd_loss(Head(s, weight), Head(t, weight.detach()), chunk=256)


# of each loss the shape of student and teacher, and the sizes by the letters of its page
PEAKS: dict[str, tuple[tuple[int, ...], dict[str, int], Loss]] = (
    {name: ((N, C), {"N": N, "C": C}, loss) for name, loss in LOGITS.items()}
    | {name: ((B, D), {"B": B, "D": D}, loss) for name, loss in FEATURES.items()}
    | {name: (MAP, dict(zip("BCHW", MAP, strict=True)), loss) for name, loss in MAPS.items()}
    | {"corsd_loss": ((N, C), {"L": 4, "B": N // 4, "K": C}, corsd)}
    | {"linear_kd_loss": ((4096, 64), {"N": 4096, "D": 64, "V": 32000, "chunk": 256}, linear)}
)


def peak(name: str) -> None:
    shape, _, loss = PEAKS[name]
    loss(leaf(*shape), torch.randn(*shape)).backward()  # threads, libraries and code are there
    for x in OTHERS.values():
        x.grad = None
    student, teacher = leaf(*shape), torch.randn(*shape)
    before = held()[0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    loss(student, teacher).backward()
    print(name, (memory("VmHWM") - before) // 4, sep="\t", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    what, *rest = sys.argv[1:]
    if what == "steps":
        for name in rest[1:] or STEPS:
            steps(name, int(rest[0]))
    else:
        for name in rest or PEAKS:
            peak(name)
