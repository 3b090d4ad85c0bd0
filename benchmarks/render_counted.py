"""The counts as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .cases import Case
from .counted import CLOCK, L2, LAUNCH, MEMORY, MULTIPROCESSORS, SAID, Launch
from .instructions import Loop

HEAD = f"""# GPU kernels by count, sm_90

Every figure here is {SAID}: made by `python -m benchmarks.counted` on a machine without a GPU, from the machine code
of nvcc and Triton and from a few blocks of each launch, run at the case's own shape on the executor of
tests/cuda_on_cpu or in Triton's interpreter, which stand for all of its blocks.

* **floor**: what forward and backward have to move at least, at {MEMORY / 1e12:.1f} TB/s.
* **traffic**: what all launches move to and from memory. What several blocks read counts once per launch; what
  one block reads again counts again where the blocks that run at a time touch more than L2 holds.
* **predicted**: for each launch the slowest of its resources, always busy, plus {LAUNCH * 1e6:.0f} us; memory
  {MEMORY / 1e12:.1f} TB/s, L2 {L2 / 1e12:.1f} TB/s, {MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9:.1f} GHz,
  of which as many are busy as there are blocks. A bound from below: latency, waves that do not fill and Python are not
  in it.
* **instructions**: of a warp's 32 lanes, per element of the student in the launch's main loops and around them.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def predicted(launches: list[Launch]) -> float:
    return sum(x.time + LAUNCH for x in launches)


def traffic(case: Case, launches: list[Launch]) -> float:
    return sum(x.traffic for x in launches) / case.bytes


def bound(launches: list[Launch]) -> str:
    """What most of the time goes to."""
    by_unit: Counter[str] = Counter()
    for x in launches:
        by_unit[x.bound] += x.time  # type: ignore[assignment]
    return by_unit.most_common(1)[0][0]


def case_row(case: Case, backend: str, launches: list[Launch]) -> list[str]:
    floor, total = case.bytes / MEMORY, predicted(launches)
    work = total - LAUNCH * len(launches)
    return [
        case.label,
        backend,
        str(len(launches)),
        f"{1e6 * floor:.1f}",
        f"{traffic(case, launches):.2f}",
        f"{1e6 * total:.1f}",
        f"{work / floor:.1f}",
        bound(launches),
        SAID,
    ]


CASE_HEAD = ("case", "backend", "launches", "floor us", "traffic / floor", "predicted us")
CASE_HEAD += ("without launches / floor", "bound by", "")


def loads(loop: Loop) -> str:
    return " ".join(f"{n} x {width}" for width, n in sorted(loop.global_loads.items()))


def launch_row(case: Case, backend: str, x: Launch) -> list[str]:
    instructions = 128 * sum(loop.clocks["issue slots"] for loop in x.loops)
    return [
        case.label,
        f"{backend} {x.work.kernel}",
        str(x.work.blocks),
        str(x.threads),
        str(x.kernel.registers),
        str(x.kernel.local_accesses),
        str(x.shared),
        f"{100 * x.occupancy:.0f} %",
        loads(x.main_loops[0]) or "-",
        f"{instructions / max(x.work.elements, 1):.1f}",
        str(x.main_loops[0].products),
        f"{1e6 * x.time:.1f}",
        f"{1e6 * x.seconds['memory']:.1f}",
        x.bound,
        f"{100 * x.kernel.matched(x.work.bytes_at):.0f} %",
        SAID,
    ]


LAUNCH_HEAD = ("case", "kernel", "blocks", "threads", "registers", "local accesses", "shared bytes", "occupancy")
LAUNCH_HEAD += ("loads x bytes", "instructions", "mma", "us", "memory us", "bound by", "matched", "")


def kernel_rows(both: list[tuple[Case, str, list[Launch]]]) -> list[list[str]]:
    worst: dict[str, tuple[Case, Launch]] = {}
    for case, backend, launches in both:
        for x in launches:
            name = f"{case.group} {backend} {x.work.kernel}"
            if name not in worst or x.time > worst[name][1].time:
                worst[name] = case, x
    rows = []
    for name, (case, x) in sorted(worst.items()):
        first, second = sorted(x.seconds, key=lambda unit: -x.seconds[unit])[:2]
        units = [f"{unit} {1e6 * x.seconds[unit]:.1f}" for unit in (first, second)]
        rows.append([name, case.label, f"{x.seconds[first] / max(x.seconds['memory'], 1e-12):.1f}", *units, SAID])
    return rows


KERNEL_HEAD = ("kernel", "case", "over memory", "bound by, us", "then, us", "")


def text(case: Case, backend: str, launches: list[Launch]) -> str:
    """A case on the screen; benchmarks/NOTES.md says what each word means."""
    floor, total = case.bytes / MEMORY, predicted(launches)
    work = (total - LAUNCH * len(launches)) / floor
    lines = [
        f"{case.label} | {backend} | {SAID}",
        f"  traffic {traffic(case, launches):.2f} of the floor {case.bytes / 1e6:.2f} MB"
        f" | predicted {1e6 * total:.1f} us, without launches {work:.2f} of the floor {1e6 * floor:.1f} us"
        f" | bound by {bound(launches)} | launches {len(launches)}",
    ]
    for x in launches:
        units = sorted(((1e6 * s, unit) for unit, s in x.seconds.items()), reverse=True)
        sectors, conflicts = x.work.requested / 32 / max(x.work.requests, 1), x.work.bank_conflicts
        lines += [
            f"  {x.work.kernel}",
            f"    blocks {x.work.blocks} x {x.threads} threads | registers {x.kernel.registers}"
            f" | local {x.kernel.local_accesses} | shared {x.shared} bytes | occupancy {100 * x.occupancy:.0f} %"
            f" | matched {100 * x.kernel.matched(x.work.bytes_at):.0f} %",
            f"    us {1e6 * x.time:.1f} | last block alone {1e6 * x.alone:.1f} | "
            + ", ".join(f"{unit} {us:.1f}" for us, unit in units if us >= 0.05),
            f"    memory {x.traffic / 1e6:.2f} MB"
            + (f" | {sectors:.1f} sectors a request" if x.work.requests else "")
            + (
                f" | bank conflicts {conflicts / x.work.shared_requests:.2f} an access"
                if x.work.shared_requests
                else ""
            ),
        ]
        lines += [
            f"    loop {loop.passes * 32 / x.work.blocks / x.threads:.1f} passes a warp | loads {loads(loop) or '-'}"
            f" | mma {loop.products} | {len(loop.instructions)} instructions,"
            f" {128 * loop.clocks['issue slots'] / max(x.work.elements, 1):.2f} an element"
            for loop in x.main_loops
        ]
    return "\n".join(lines)


def report(cases: list[Case], found: dict[str, list[list[Launch]]]) -> str:
    both = [(case, backend, of[i]) for i, case in enumerate(cases) for backend, of in found.items()]
    launches = [launch_row(case, backend, x) for case, backend, of in both for x in of]
    parts = [
        HEAD,
        f"## Cases ({SAID})\n",
        table(CASE_HEAD, [case_row(*x) for x in both]),
        f"\n## Launches ({SAID})\n",
        "Loads and mma are those of one pass through the loop that takes most issue slots, on the path that ran;\n"
        "local accesses are spilt registers, or arrays that are indexed at run time; matched is the share of the\n"
        "bytes touched whose source line the machine code has a load or store of.\n",
        table(LAUNCH_HEAD, launches),
        f"\n## What binds each kernel ({SAID})\n",
        "In the case where it takes longest; the factor is over the time that its memory traffic takes.\n",
        table(KERNEL_HEAD, kernel_rows(both)),
    ]
    return "\n".join(parts) + "\n"
