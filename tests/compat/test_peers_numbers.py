"""The presets against the numbers that the peers' own code gave in float64, in tests/golden/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import DEVICE, wave
from torch import Tensor

from kdkernels.compat import kd_zoo, mdistiller, mlld, repdistiller, torchdistill

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS = [row for name in ("relational", "maps", "logits") for row in json.loads((GOLDEN / f"{name}.json").read_text())]
PATHS = {
    "student_module_path": "m",
    "student_module_io": "output",
    "teacher_module_path": "m",
    "teacher_module_io": "output",
}
WHERE = {"io": "output", "path": "m"}

Row = dict[str, Any]
Preset = Callable[[Any, Any, Row], Any]


def io(x: Tensor | list[Tensor], *names: str) -> dict[str, dict[str, Tensor]]:
    names = names or ("m",)
    return {name: {"output": y} for name, y in zip(names, x if isinstance(x, list) else [x], strict=True)}


def of_io(make: Callable[[Row], torch.nn.Module], flat: bool = False) -> Preset:
    def loss(s: Tensor, t: Tensor, row: Row) -> Tensor:
        s, t = (x.flatten(1) if flat else x for x in (s, t))
        return make(row["args"])(io(s), io(t), labels(row))

    return loss


def flat(make: Callable[[Row], Callable[[Tensor, Tensor], Any]]) -> Preset:
    return lambda s, t, row: make(row.get("args", {}))(s.flatten(1), t.flatten(1))


def labels(row: Row) -> Tensor | None:
    if "labels" not in row:
        return None
    slope, offset, modulus = (
        int(n) for n in row["labels"][len("label[i]=(") :].replace("i+", " ").replace(")%", " ").split()
    )
    return (slope * torch.arange(row["student"]["shape"][0], device=DEVICE) + offset) % modulus


def fsp_of_torchdistill(s: list[Tensor], t: list[Tensor], row: Row) -> Tensor:
    a, b = ({"io": "output", "path": path} for path in ("a", "b"))
    pair = {"student_first": a, "student_second": b, "teacher_first": a, "teacher_second": b}
    return torchdistill.FSPLoss({"pair": pair})(io(s, "a", "b"), io(t, "a", "b"))


def kernel_of(args: Row) -> Row:
    gaussian = {"type": "gaussian", "gamma": args.get("gamma"), "max_p": args.get("max_p")}
    return gaussian if "gamma" in args else {"type": "bilinear"}


def cckd(args: Row) -> torch.nn.Module:
    return torchdistill.CCKDLoss("m", "m", kernel_of(args), args["reduction"])


def at_pairs(weight: float = 1) -> Row:
    return {"pair": {"student": WHERE, "teacher": WHERE, "weight": weight}}


SHAPES = [(3, 4, 8, 8), (3, 6, 8, 8), (3, 8, 4, 4)]
RKD: Preset = lambda s, t, row: repdistiller.RKDLoss(**row["args"])(s, t)  # noqa: E731
TORCHDISTILL_RKD = of_io(lambda args: torchdistill.RKDLoss("m", "m", **args))
# the name of a row up to its bracket: the preset
PRESETS: dict[str, Preset] = {
    "rkd": RKD,
    "rkd_distance": RKD,
    "rkd_angle": RKD,
    "rkd_mdistiller": lambda s, t, row: mdistiller.rkd_loss(s, t, **row["args"]),
    "rkd_squared": lambda s, t, row: mdistiller.rkd_loss(s, t, **row["args"]),
    "rkd_zoo": flat(lambda args: kd_zoo.RKD(**args)),
    "rkd_torchdistill": TORCHDISTILL_RKD,
    "rkd_torchdistill_sum": TORCHDISTILL_RKD,
    "pkt": flat(lambda args: repdistiller.PKT()),
    "pkt_mdistiller": flat(lambda args: mdistiller.pkt_loss),
    "pkt_zoo": flat(lambda args: kd_zoo.PKTCosSim()),
    "pkt_torchdistill": of_io(lambda args: torchdistill.PKTLoss(**PATHS, **args), flat=True),
    "cc_zoo": flat(lambda args: kd_zoo.CC(**args)),
    "cc_torchdistill_gaussian": of_io(cckd, flat=True),
    "cc_torchdistill_gaussian_sum": of_io(cckd, flat=True),
    "cc_torchdistill_bilinear": of_io(cckd, flat=True),
    "correlation": lambda s, t, row: repdistiller.Correlation()(s, t),
    **{
        f"irg_{part}": lambda s, t, row: kd_zoo.IRG(**row["args"])(s, t)
        for part in ("whole", "vertex", "edges", "transformation")
    },
    "sp": lambda s, t, row: repdistiller.Similarity()([s], [t]),
    "sp_zoo": lambda s, t, row: kd_zoo.SP()(s, t),
    "at": lambda s, t, row: repdistiller.Attention(**row["args"])([s], [t]),
    "at_list": lambda s, t, row: repdistiller.Attention(**row["args"])(s, t),
    "at_mdistiller": lambda s, t, row: mdistiller.at_loss([s], [t], **row["args"]),
    "at_mdistiller_list": lambda s, t, row: mdistiller.at_loss(s, t, **row["args"]),
    "at_zoo": lambda s, t, row: kd_zoo.AT(**row["args"])(s, t),
    "at_torchdistill_code": of_io(lambda args: torchdistill.ATLoss(at_pairs(args["weight"]), args["mode"])),
    "at_torchdistill_paper": of_io(lambda args: torchdistill.ATLoss(at_pairs(args["weight"]), args["mode"])),
    "ft": lambda s, t, row: repdistiller.FactorTransfer(**row["args"])(s, t),
    "nst": lambda s, t, row: repdistiller.NSTLoss()([s], [t]),
    "nst_list": lambda s, t, row: repdistiller.NSTLoss()(s, t),
    "nst_mdistiller": lambda s, t, row: mdistiller.nst_loss([s], [t]),
    "nst_mdistiller_list": lambda s, t, row: mdistiller.nst_loss(s, t),
    "nst_zoo": lambda s, t, row: kd_zoo.NST()(s, t),
    "ickd_torchdistill": lambda s, t, row: torchdistill.ChSimLoss(at_pairs())(io(s), io(t)),
    "fsp": lambda s, t, row: repdistiller.FSP(SHAPES, SHAPES)(s, t),
    "fsp_zoo": lambda s, t, row: kd_zoo.FSP()(*s, *t),
    "fsp_torchdistill": fsp_of_torchdistill,
    "kd": lambda s, t, row: repdistiller.DistillKL(**row["args"])(s, t),
    "kd_map": lambda s, t, row: repdistiller.DistillKL(**row["args"])(s, t),
    "kd_standardized": lambda s, t, row: mdistiller.kd_loss(s, t, **row["args"]),
    "kd_standardized_torchdistill": of_io(lambda args: torchdistill.LogitStdKDLoss(**PATHS, **args)),
    "dkd": lambda s, t, row: mdistiller.dkd_loss(s, t, labels(row), **row["args"]),
    "dkd_standardized": lambda s, t, row: mdistiller.dkd_loss(s, t, labels(row), **row["args"]),
    "mlld_kd": lambda s, t, row: mlld.kd_loss(s, t, **row["args"]),
    "mlld_kd_rows": lambda s, t, row: mlld.kd_loss(s, t, **row["args"]).sum(),
    "mlld_fork_kd_standardized": lambda s, t, row: mlld.kd_loss(s, t, **row["args"]),
    "mlld_cc": lambda s, t, row: mlld.cc_loss(s, t, **row["args"]),
    "mlld_bc": lambda s, t, row: mlld.bc_loss(s, t, **row["args"]),
}


def made(recipe: Row | list[Row], dtype: torch.dtype) -> Tensor | list[Tensor]:
    if isinstance(recipe, list):
        return [made(one, dtype) for one in recipe]
    x = wave(recipe["shape"], recipe["seed"], recipe["scale"], dtype)
    return x.clamp(min=0) if recipe["clamp"] else x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_numbers_are_the_peers(name: str, dtype: torch.dtype) -> None:
    rows = [row for row in ROWS if row["name"].partition("[")[0] == name and "P=0" not in row["name"]]  # 0 is refused
    assert rows
    for row in rows:
        check(row, PRESETS[name], dtype)


def check(row: Row, preset: Preset, dtype: torch.dtype) -> None:
    student, teacher = made(row["student"], dtype), made(row["teacher"], dtype)
    leaves = student if isinstance(student, list) else [student]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = preset(student, teacher, row)
    parts = loss if isinstance(loss, list) else [loss]
    relative, absolute = (1e-9, 1e-12) if dtype == torch.float64 else (1e-5, 1e-7)
    near = lambda x, slack=absolute: pytest.approx(x, rel=relative, abs=slack)  # noqa: E731
    total = sum(part.sum() for part in parts)
    assert [part.item() for part in parts] == [near(part) for part in row.get("parts", [row["loss"]])], row["name"]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    for gradient, norm, dot in zip(gradients, row["grad_norm"], row["grad_dot_wave"], strict=True):
        along = wave(gradient.shape, 0.5, 1)
        slack = absolute if dtype == torch.float64 else absolute + 1e-6 * norm * along.norm().item()
        assert gradient.double().norm().item() == near(norm), row["name"]
        assert (gradient.double() * along).sum().item() == near(dot, slack), row["name"]
