"""torchdistill's losses of two modules' features and maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...at_loss import at_loss
from ...cc_loss import cc_loss
from ...feature_maps import channel_gram, energy
from ...ickd_loss import ickd_loss
from ...ops.checks import check_choice
from ...pkt_loss import pkt_loss
from ...rkd_loss import rkd_loss
from ..scales import published_sp, root, warn_of_trained_teacher
from .logits import IODict

Pair = Mapping[str, Any]  # {"student": {"io": "output", "path": "layer4"}, ..., "weight": 1}


class SPKDLoss(nn.Module):
    """||G_t - G_s||_F^2 of two modules' outputs (B, ...), with similarity rows of L1 norm 1; a scalar.

    Args:
        student_output_path, teacher_output_path: ``student_io_dict[path]["output"]`` are the features.
        reduction: "batchmean" divides by B^2. Quirk: any other string is a plain sum.

    Quirk: rows are divided by their L1 norm, in the paper by their L2 norm, which makes this loss many times smaller
    (60 times at B = 64 on ordinary features): use ``kdkernels.sp_loss(student, teacher)``, or ``row_norm="l1"`` there.
    """

    def __init__(self, student_output_path: str, teacher_output_path: str, reduction: str, **kwargs: Any) -> None:
        super().__init__()
        self.student_output_path, self.teacher_output_path = student_output_path, teacher_output_path
        self.reduction = reduction

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor:
        student = student_io_dict[self.student_output_path]["output"]
        teacher = teacher_io_dict[self.teacher_output_path]["output"]
        return published_sp([student], [teacher], row_norm="l1", reduction=self.reduction)


class RKDLoss(nn.Module):
    """dist_factor times RKD's distances plus angle_factor times its angles, of two modules' outputs (B, ...).

    Args:
        student_output_path, teacher_output_path: ``student_io_dict[path]["output"]`` are the features.
        dist_factor, angle_factor: a factor of None or 0 leaves its term out.
        reduction: of torch.nn.SmoothL1Loss: "mean" over the B^2 distances and the B^3 angles, or "sum".
    """

    def __init__(
        self,
        student_output_path: str,
        teacher_output_path: str,
        dist_factor: float | None,
        angle_factor: float | None,
        reduction: str,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.student_output_path, self.teacher_output_path = student_output_path, teacher_output_path
        self.dist_factor, self.angle_factor, self.reduction = dist_factor, angle_factor, reduction

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor:
        student = student_io_dict[self.student_output_path]["output"]
        teacher = teacher_io_dict[self.teacher_output_path]["output"]
        warn_of_trained_teacher(teacher)
        return rkd_loss(
            student,
            teacher,
            distance_weight=self.dist_factor or 0.0,
            angle_weight=self.angle_factor or 0.0,
            reduction=self.reduction,
        )


class PKTLoss(nn.Module):
    """Probabilistic knowledge transfer of two modules' inputs or outputs (B, d): ``kdkernels.pkt_loss``."""

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io
        self.eps = eps

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor:
        student = student_io_dict[self.student_module_path][self.student_module_io]
        teacher = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        warn_of_trained_teacher(teacher)
        return pkt_loss(student, teacher, eps=self.eps)


class CCKDLoss(nn.Module):
    """The distance between the kernel matrices of two modules' outputs (B, d).

    Args:
        student_linear_path, teacher_linear_path: ``student_io_dict[path]["output"]`` are the features.
        kernel_config: {"type": "gaussian", "gamma": gamma, "max_p": order} or {"type": "bilinear"}.
        reduction: "batchmean" divides by B^2. Quirk: any other string is the plain distance.

    Quirk: the root of the squared distance, which is what "batchmean" divides by B^2. Quirk: rows are not divided by
    their length. Use ``kdkernels.cc_loss(student, teacher)``, which has neither.
    """

    def __init__(
        self,
        student_linear_path: str,
        teacher_linear_path: str,
        kernel_config: Mapping[str, Any],
        reduction: str,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.student_linear_path, self.teacher_linear_path = student_linear_path, teacher_linear_path
        self.kernel_type, self.reduction = kernel_config["type"], reduction
        check_choice("kernel_config['type']", self.kernel_type, ("gaussian", "bilinear"))
        if self.kernel_type == "gaussian":
            self.gamma, self.max_p = kernel_config["gamma"], kernel_config["max_p"]

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor:
        student = student_io_dict[self.student_linear_path]["output"]
        teacher = teacher_io_dict[self.teacher_linear_path]["output"]
        warn_of_trained_teacher(teacher)
        options = {"gamma": self.gamma, "order": self.max_p} if self.kernel_type == "gaussian" else {}
        squared = cc_loss(student, teacher, kernel=self.kernel_type, normalize=False, reduction="sum", **options)
        distance = root(squared)
        return distance / max(student.shape[0], 1) ** 2 if self.reduction == "batchmean" else distance


class ATLoss(nn.Module):
    """Attention transfer of pairs of modules' maps (B, C, H, W), weighted and summed.

    Args:
        at_pairs: {name: {"student": {"io": ..., "path": ...}, "teacher": {...}, "weight": 1}}.
        mode: "code": the mean of the squared differences, ``kdkernels.at_loss``; "paper": the norm of each sample's
            difference, averaged.
    """

    def __init__(self, at_pairs: Mapping[str, Pair], mode: str = "code", **kwargs: Any) -> None:
        super().__init__()
        check_choice("mode", mode, ("code", "paper"))
        self.at_pairs, self.mode = at_pairs, mode

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor | int:
        students, teachers, weights = _of_pairs(self.at_pairs, student_io_dict, teacher_io_dict)
        if self.mode == "code":
            return at_loss(students, teachers, layer_weights=weights) if students else 0
        loss: Tensor | int = 0
        for student, teacher, weight in zip(students, teachers, weights, strict=True):
            difference = energy(student, normalize=True) - energy(teacher.detach(), normalize=True)
            loss = loss + weight * torch.linalg.vector_norm(difference, dim=(1, 2)).sum() / max(student.shape[0], 1)
        return loss


class FSPLoss(nn.Module):
    """The distance of FSP matrices, of pairs of pairs of modules' maps (B, C, H, W), weighted and summed.

    Args:
        fsp_pairs: {name: {"student_first": {"io": ..., "path": ...}, "student_second": ..., "teacher_first": ...,
            "teacher_second": ..., "weight": 1}}.

    Quirk: of two sizes the larger is pooled by its maximum. Quirk: the norms of the columns of the matrices'
    difference, summed, over B: use ``kdkernels.fsp_loss`` for the mean of the squares.
    """

    def __init__(self, fsp_pairs: Mapping[str, Pair], **kwargs: Any) -> None:
        super().__init__()
        self.fsp_pairs = fsp_pairs

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor | int:
        loss: Tensor | int = 0
        for pair in self.fsp_pairs.values():
            student, teacher = (
                [io_dict[pair[f"{who}_{part}"]["path"]][pair[f"{who}_{part}"]["io"]] for part in ("first", "second")]
                for who, io_dict in (("student", student_io_dict), ("teacher", teacher_io_dict))
            )
            for x in teacher:
                warn_of_trained_teacher(x)
            difference = self.compute_fsp_matrix(*student) - self.compute_fsp_matrix(*(x.detach() for x in teacher))
            norms = torch.linalg.vector_norm(difference, dim=1).sum()
            loss = loss + pair.get("weight", 1) * norms / max(len(student[0]), 1)
        return loss

    @staticmethod
    def compute_fsp_matrix(first_feature_map: Tensor, second_feature_map: Tensor) -> Tensor:
        maps = first_feature_map, second_feature_map
        size = tuple(min(lengths) for lengths in zip(*(x.shape[2:] for x in maps), strict=True))
        first, second = (x if x.shape[2:] == size else F.adaptive_max_pool2d(x, size) for x in maps)
        return channel_gram(first, second) / max(first.shape[2:].numel(), 1)


class ChSimLoss(nn.Module):
    """ICKD: the distance of row-normalised channel Gram matrices of pairs of modules' maps, weighted and summed.

    Args:
        feature_pairs: {name: {"student": {"io": ..., "path": ...}, "teacher": {...}, "weight": 1}}; (B, C, ...) with
            the same C.

    Quirk: over B twice: ``kdkernels.ickd_loss``, of which this is 1 / B, is the mean over the batch.
    """

    def __init__(self, feature_pairs: Mapping[str, Pair], **kwargs: Any) -> None:
        super().__init__()
        self.feature_pairs = feature_pairs

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor | int:
        students, teachers, weights = _of_pairs(self.feature_pairs, student_io_dict, teacher_io_dict)
        if not students:
            return 0
        return ickd_loss(students, teachers, layer_weights=weights) / max(len(students[0]), 1)


def _of_pairs(
    pairs: Mapping[str, Pair], student_io_dict: IODict, teacher_io_dict: IODict
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """The students' and the teachers' tensors and the weights of a configuration's pairs."""
    values = pairs.values()
    students = [student_io_dict[pair["student"]["path"]][pair["student"]["io"]] for pair in values]
    teachers = [teacher_io_dict[pair["teacher"]["path"]][pair["teacher"]["io"]] for pair in values]
    for teacher in teachers:
        warn_of_trained_teacher(teacher)
    return students, teachers, [pair.get("weight", 1) for pair in values]
