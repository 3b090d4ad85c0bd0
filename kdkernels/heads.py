"""What ``linear_kd_loss`` takes in place of logits: an output head, or a teacher's largest log-probabilities."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .ops.checks import FLOATING, check_choice, check_number, check_positive
from .ops.linear_kd import Teacher

RESTS = ("bucket", "drop", "renormalise", "renormalise_both")


class Head(NamedTuple):
    """Logits before they are made: cap(scale (hidden weight^T + bias)), cap(z) = softcap tanh(z / softcap).

    Args:
        hidden: (..., D), the last hidden states; all dimensions but the last are positions.
        weight: (V, D), what ``model.get_output_embeddings().weight`` is in transformers; a plain tensor, not a module.
        bias: (V,) or None.
        scale: what the model multiplies its logits by (Cohere's ``logit_scale``; Granite's 1 / ``logits_scaling``).
        softcap: Gemma's ``final_logit_softcapping``, or None.

    float16, bfloat16, float32 or float64, any strides; hidden and weight may differ.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class TopK(NamedTuple):
    """A teacher of whom only k log-probabilities per position are known.

    Args:
        ids: (..., k) int64 vocabulary ids, no one twice in a position.
        logprobs: (..., k): log_softmax over the whole vocabulary, at the ids. -inf marks padding: such an entry is not
            there, whatever its id.
        rest: what becomes of all other tokens. "bucket": they are one more class, with the mass 1 - sum p and the
            student's 1 - sum q (each at least 1e-7). "drop": nothing, the sum over the k ids is all; it may be
            negative. "renormalise": the teacher has no mass there, and p is p / sum p. "renormalise_both": and q is
            q / sum q, so that the student's mass elsewhere does not count.
        temperature: that of ``logprobs``. With "bucket" and "drop" it has to be the loss's; with the others logprobs
            are turned into the loss's temperature, exactly, as p is renormalised over the k ids.
    """

    ids: Tensor
    logprobs: Tensor
    rest: str = "bucket"
    temperature: float = 1.0


def check_head(head: Head, who: str, caller: str) -> None:
    """Tensors of fitting shapes, whose values are here."""
    for name, x in zip(head._fields, head[: 2 if head.bias is None else 3], strict=False):
        check_plain(x, f"{caller}: {who}'s {name}")
    hidden, weight, bias, scale, softcap = head
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(
            f"{caller}: {who}'s hidden and weight must be (..., D) and (V, D), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{caller}: {who}'s bias must be (V,) with weight {tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{caller}: {who}'s hidden is on {hidden.device} and {name} on {x.device}; move one of them"
            )
    check_number(f"{caller}: {who}'s scale", scale)
    if not -math.inf < scale < math.inf or scale == 0:  # math.isfinite takes no symbolic number
        raise ValueError(f"{caller}: {who}'s scale must be finite and not 0, got {scale}")
    if softcap is not None:
        check_positive(f"{caller}: {who}", softcap=softcap)


def check_plain(x: object, name: str) -> None:
    """A floating-point tensor that holds its values itself: not a module, not quantised, not a shard."""
    if isinstance(x, nn.Module):
        if any(".lora_" in f".{key}" for key in x.state_dict()):
            raise TypeError(
                f"{name} must be a tensor, got a {type(x).__name__} with LoRA factors, whose .weight is without them: "
                "pass the merged weight, module.get_delta_weight(adapter) + module.base_layer.weight"
            )
        raise TypeError(f"{name} must be a tensor, got the module {type(x).__name__}: pass module.weight")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor, of which this process has a shard: pass {name.split()[-1]}.full_tensor(), or a "
            "slice of the vocabulary as a plain tensor (to_local()) with group="
        )
    if hasattr(x, "ds_shape") and x.numel() == 0:
        raise ValueError(
            f"{name} is partitioned by ZeRO-3 and empty here: call under deepspeed.zero.GatheredParameters([weight])"
        )
    if x.dtype not in FLOATING or hasattr(x, "quant_state") or hasattr(type(x), "__tensor_flatten__"):
        raise TypeError(
            f"{name} must be a plain float16, bfloat16, float32 or float64 tensor, got {x.dtype} in a "
            f"{type(x).__name__}; of a quantised weight pass the dequantised one"
        )


def check_top_k(teacher: TopK, caller: str, temperature: float, divergence: str) -> None:
    ids, logprobs, rest, made_at = teacher
    check_plain(logprobs, f"{caller}: TopK's logprobs")
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{caller}: TopK's ids must be an int64 tensor, got {kind}")
    if ids.shape != logprobs.shape or ids.dim() < 2 or not ids.shape[-1]:
        raise ValueError(
            f"{caller}: TopK's ids and logprobs must be (..., k) alike, got {tuple(ids.shape)} and "
            f"{tuple(logprobs.shape)}"
        )
    if ids.device != logprobs.device:
        raise ValueError(f"{caller}: TopK's ids are on {ids.device} and logprobs on {logprobs.device}; move one")
    check_choice(f"{caller}: TopK's rest", rest, RESTS)
    check_positive(f"{caller}: TopK's", temperature=made_at)
    if made_at != temperature and rest in ("bucket", "drop"):
        raise ValueError(
            f"{caller}: TopK's log-probabilities are at temperature {made_at} and the loss at {temperature}: the mass "
            f"of k tokens at another temperature is not known from them. Take them at {temperature}, or "
            "rest='renormalise'"
        )
    if rest == "renormalise" and divergence == "reverse":
        raise ValueError(
            f"{caller}: the reverse KL is infinite where the teacher has no mass, which with rest='renormalise' is "
            "everywhere but at the k ids: use rest='bucket' or 'renormalise_both', divergence='jsd' or 'skew_reverse'"
        )


def read_teacher(
    teacher: Head | TopK | Tensor, student: Head, temperature: float, divergence: str, caller: str
) -> Teacher:
    """The teacher as the op takes it: checked, a constant, positions flattened."""
    if isinstance(teacher, Head):
        check_head(teacher, "teacher", caller)
        positions, first = teacher.hidden.shape[:-1], teacher.hidden
        hidden = teacher.hidden.detach().reshape(-1, teacher.hidden.shape[-1])
        bias = None if teacher.bias is None else teacher.bias.detach()
        softcap = float(teacher.softcap or 0)
        found = Teacher(hidden, teacher.weight.detach(), bias, float(teacher.scale), softcap)
    elif isinstance(teacher, TopK):
        check_top_k(teacher, caller, temperature, divergence)
        positions, first = teacher.ids.shape[:-1], teacher.ids
        k = teacher.ids.shape[-1]
        ids, logprobs = teacher.ids.reshape(-1, k), teacher.logprobs.detach().reshape(-1, k)
        found = Teacher(ids=ids, logprobs=logprobs, rest=teacher.rest, made_at=float(teacher.temperature))
    else:
        check_plain(teacher, f"{caller}: teacher (a Head, a TopK or logits)")
        positions, first = teacher.shape[:-1], teacher
        found = Teacher(teacher_logits=teacher.detach().reshape(-1, teacher.shape[-1]))
    if positions != student.hidden.shape[:-1]:
        raise ValueError(
            f"{caller}: student and teacher must have the same positions, got {tuple(student.hidden.shape[:-1])} and "
            f"{tuple(positions)}"
        )
    if first.device != student.hidden.device:
        raise ValueError(
            f"{caller}: student is on {student.hidden.device} and teacher on {first.device}; move one of them"
        )
    return found
