"""patch() and unpatch(), in packages of the peers' shape."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from standins import DISTILLERS, FORK, ZOO, importable, write_distillers, write_zoo  # noqa: F401  importable is a fixture

from kdkernels.compat import mdistiller, mlld, repdistiller

LEFT = {"ABLoss", "HintLoss", "KDSVD", "VIDLoss"}


def test_repdistillers_zoo(importable: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    write_zoo(importable)
    repdistiller.patch()
    lines = capsys.readouterr().out.splitlines()
    try:
        zoo, user = importlib.import_module("distiller_zoo"), importlib.import_module("train_student")
        assert user.DistillKL is repdistiller.DistillKL
        for file, (name, _) in ZOO.items():
            defined = getattr(sys.modules[f"distiller_zoo.{file}"], name)
            assert getattr(zoo, name) is defined
            assert (defined is getattr(repdistiller, name, None)) == (name not in LEFT)
        assert sum("replaced" in line for line in lines) == 9
        assert "kdkernels: replaced distiller_zoo.RKD.RKDLoss(w_d=25, w_a=50)" in lines
        assert "kdkernels: left     distiller_zoo.FitNet.HintLoss: a mean squared error, which PyTorch has" in lines
        assert len(lines) == len(ZOO)
        repdistiller.patch()  # again: nothing of theirs is there to be replaced
        assert sum("replaced" in line for line in capsys.readouterr().out.splitlines()) == 0
    finally:
        repdistiller.unpatch()
    assert zoo.RKDLoss.__module__ == "distiller_zoo.RKD"
    assert sys.modules["distiller_zoo.RKD"].RKDLoss is zoo.RKDLoss
    repdistiller.unpatch()  # nothing to put back


def test_names_imported_earlier_are_left_and_printed(
    importable: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_zoo(importable)
    user = importlib.import_module("train_student")
    repdistiller.patch()
    try:
        assert user.DistillKL.__module__ == "distiller_zoo.KD"
        printed = capsys.readouterr().out
        assert "left     train_student.DistillKL: imported before patch() was called" in printed
    finally:
        repdistiller.unpatch()


def test_mdistillers_functions(importable: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    write_distillers(importable, DISTILLERS)
    mdistiller.patch()
    lines = capsys.readouterr().out.splitlines()
    try:
        distillers = importlib.import_module("mdistiller.distillers")
        s, t = torch.randn(4, 10), torch.randn(4, 10)
        assert torch.equal(distillers.KD().forward_train(s, t, 4.0), mdistiller.kd_loss(s, t, 4.0))
        for name in ("dkd_loss", "sp_loss", "at_loss", "rkd_loss", "pkt_loss", "nst_loss"):
            module = sys.modules[f"mdistiller.distillers.{name.removesuffix('_loss').upper()}"]
            assert getattr(module, name) is getattr(mdistiller, name)
        assert distillers.VID().forward_train(*range(4)) == "theirs"
        assert sum("replaced" in line for line in lines) == 7
        assert sum("left" in line for line in lines) == 3
    finally:
        mdistiller.unpatch()
    assert distillers.KD().forward_train(s, t, 4.0) == "theirs"


def test_a_forks_functions_are_told_by_their_arguments(
    importable: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_distillers(importable, FORK)
    mdistiller.patch()
    try:
        importlib.import_module("mdistiller.distillers")
        kd, mlkd, sp = (sys.modules[f"mdistiller.distillers.{file}"] for file in ("KD", "MLKD", "SP"))
        s, t = torch.randn(4, 10), torch.randn(4, 10)
        standardised = mdistiller.kd_loss(s, t, 2.0, logit_stand=True)
        assert torch.equal(kd.kd_loss(s, t, 2.0, True), standardised)
        assert torch.equal(mlkd.kd_loss(s, t, 2.0, True), mdistiller.kd_loss(s, t, 2.0))  # the fourth is reduce
        assert mlkd.kd_loss(s, t, 2.0, False).shape == (4,)
        torch.testing.assert_close(mlkd.kd_loss(s, t, 2.0, logit_stand=True), standardised)
        assert (mlkd.cc_loss, mlkd.bc_loss) == (mlld.cc_loss, mlld.bc_loss)
        assert sp.sp_loss(1, 2) == "theirs"
        printed = capsys.readouterr().out
        expected = (
            "left     mdistiller.distillers.SP.sp_loss(g_s, g_t, weight=1.0): of that name, ours takes (g_s, g_t)"
        )
        assert expected in printed
    finally:
        mdistiller.unpatch()


def test_a_package_that_is_not_there() -> None:
    with pytest.raises(ImportError, match=r"patch\(\) found no distiller_zoo: run from its repository's folder"):
        repdistiller.patch()
