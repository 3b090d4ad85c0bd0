"""Packages of the shape of RepDistiller's distiller_zoo and mdistiller's distillers, with losses of no meaning.

What counts is where a loss is defined, its name and arguments, and who imports it from where.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ZOO = {  # file: name, arguments of __init__
    "AB": ("ABLoss", "feat_num, margin=1.0"),
    "AT": ("Attention", "p=2"),
    "CC": ("Correlation", ""),
    "FSP": ("FSP", "s_shapes, t_shapes"),
    "FT": ("FactorTransfer", "p1=2, p2=1"),
    "FitNet": ("HintLoss", ""),
    "KD": ("DistillKL", "T"),
    "KDSVD": ("KDSVD", "k=1"),
    "NST": ("NSTLoss", ""),
    "PKT": ("PKT", ""),
    "RKD": ("RKDLoss", "w_d=25, w_a=50"),
    "SP": ("Similarity", ""),
    "VID": (
        "VIDLoss",
        "num_input_channels, num_mid_channel, num_target_channels, init_pred_var=5.0, eps=1e-05",
    ),
}
DISTILLERS = {  # file: functions beside the distiller, which calls the first by its name in the file
    "KD": ["kd_loss(logits_student, logits_teacher, temperature)"],
    "DKD": ["dkd_loss(logits_student, logits_teacher, target, alpha, beta, temperature)", "cat_mask(t, mask1, mask2)"],
    "SP": ["sp_loss(g_s, g_t)", "similarity_loss(f_s, f_t)"],
    "AT": ["at_loss(g_s, g_t, p)", "single_stage_at_loss(f_s, f_t, p)"],
    "RKD": ["rkd_loss(f_s, f_t, squared=False, eps=1e-12, distance_weight=25, angle_weight=50)"],
    "PKT": ["pkt_loss(f_s, f_t, eps=1e-07)"],
    "NST": ["nst_loss(g_s, g_t)", "poly_kernel(a, b)"],
    "KDSVD": ["kdsvd_loss(g_s, g_t, k)", "svd(feat, n=1)"],
    "VID": ["vid_loss(regressor, log_scale, f_s, f_t, eps=1e-05)"],
    "ReviewKD": ["hcl_loss(fstudent, fteacher)"],
}
FORK = DISTILLERS | {
    "KD": ["kd_loss(logits_student_in, logits_teacher_in, temperature, logit_stand)"],
    "DKD": ["dkd_loss(logits_student_in, logits_teacher_in, target, alpha, beta, temperature, logit_stand)"],
    "MLKD": [
        "kd_loss(logits_student_in, logits_teacher_in, temperature, reduce=True, logit_stand=False)",
        "cc_loss(logits_student, logits_teacher, temperature, reduce=True)",
        "bc_loss(logits_student, logits_teacher, temperature, reduce=True)",
    ],
    "SP": ["sp_loss(g_s, g_t, weight=1.0)"],  # arguments that nobody knows
}


def write_zoo(folder: Path) -> None:
    package = folder / "distiller_zoo"
    package.mkdir()
    for file, (name, arguments) in ZOO.items():
        code = f"class {name}:\n    def __init__(self, {arguments}): pass\n    def forward(self, *x): return 'theirs'\n"
        (package / f"{file}.py").write_text(code)
    lines = [f"from .{file} import {name}\n" for file, (name, _) in ZOO.items()]
    (package / "__init__.py").write_text("".join(lines))
    (folder / "train_student.py").write_text("from distiller_zoo import DistillKL, HintLoss, Similarity\n")


def write_distillers(folder: Path, files: dict[str, list[str]]) -> None:
    package = folder / "mdistiller" / "distillers"
    package.mkdir(parents=True)
    for file, functions in files.items():
        code = "".join(f"def {signature}: return 'theirs'\n\n" for signature in functions)
        call = functions[0].partition("(")[0]
        code += f"class {file}:\n    def forward_train(self, *x): return {call}(*x)\n"
        (package / f"{file}.py").write_text(code)
    # as there: the class hides its module behind the package's attribute
    (package / "__init__.py").write_text("".join(f"from .{file} import {file}\n" for file in files))
    (folder / "mdistiller" / "__init__.py").touch()


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages can be imported, and are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("distiller_zoo", "mdistiller", "train_student"):
            del sys.modules[name]
