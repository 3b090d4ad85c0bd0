"""What trainers check before and while they train, so that nothing goes wrong without a word."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .distillation import Distillation
from .methods import Method, Outputs

FIRST_STEPS, FAR = 5, 30.0  # in so many steps a term that is so many times the others' sum is named

logger = logging.getLogger("kdkernels")


def check_optimizer(distillation: Distillation, *optimizers: torch.optim.Optimizer) -> None:
    """The optimizers together train the student and all of the method's heads: those they miss would stay random."""
    known = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    name = type(distillation.method).__name__
    own = (distillation.method, distillation.adapters)
    missing = [n for m in own for n, p in m.named_parameters() if p.requires_grad and id(p) not in known]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"the optimizer misses parameters of {name}'s own heads ({', '.join(missing[:3])}{more}): make it over "
            "distillation.parameters(), which has the student's and the heads'"
        )
    student = [p for p in distillation.student.parameters() if p.requires_grad]
    if student and not any(id(p) in known for p in student):
        raise ValueError("the optimizer has none of the student's parameters: make it over distillation.parameters()")


def check_batch(batch: Any, name: str) -> None:
    """A batch is (images, labels) or (images, labels, negatives' labels), perhaps with a teacher's outputs."""
    tensors = [x for x in batch if x is not None and not isinstance(x, Outputs)] if type(batch) in (tuple, list) else []
    if len(tensors) in (2, 3) and all(isinstance(x, Tensor) for x in tensors):
        return
    if isinstance(batch, Mapping):
        got = f"a dict with {', '.join(map(repr, batch))}"
    elif isinstance(batch, (tuple, list)):
        got = f"({', '.join(type(x).__name__ for x in batch)})"
    else:
        got = type(batch).__name__
    raise TypeError(
        f"{name}: batches must be (images, labels) tensors, got {got}: give the DataLoader a collate_fn that returns "
        "the two, or use kdkernels.integrations.hf, which takes dicts"
    )


def check_finite(values: Mapping[str, float], where: str) -> None:
    """Stop at the first step whose loss is not a number, before it reaches the weights."""
    if all(math.isfinite(value) for value in values.values()):
        return
    bad = [name for name, value in values.items() if name != "loss" and not math.isfinite(value)]
    rest = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    raise FloatingPointError(
        f"the loss is not finite at {where}: {', '.join(bad) or 'loss'} ({rest}); the weights are those before it"
    )


def name_what_drowns(method: Method, step: int, terms: Mapping[str, float]) -> bool:
    """Log a term that exceeds all others together by far, if one does, and the option that scales it."""
    name = max(terms, key=lambda term: terms[term])
    others = sum(value for term, value in terms.items() if term != name)
    if not terms[name] > FAR * others > 0:
        return False
    logger.warning(
        "in step %d %r is %.3g, %.0f times the other terms together (%s), which hardly count beside it; "
        "it is scaled by %s",
        step,
        name,
        terms[name],
        terms[name] / others,
        ", ".join(f"{term} {value:.3g}" for term, value in terms.items() if term != name),
        method.scaled_by(name),
    )
    return True
