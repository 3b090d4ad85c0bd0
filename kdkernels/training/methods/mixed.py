"""Several methods at once: the sum of their terms, with what they share counted once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..triplets import triplet_labels
from .base import Batch, Method, Outputs


class Mixed(Method):
    """``Mixed([KD(), SP(weight=300)])``: 0.1 CE + 0.9 KD + 300 SP.

    A term that several methods have, as cross entropy, is that of the first one that has it. At most one method may
    change the batch (mix, turn or triple its images); its terms come first, and the others compare the networks on the
    images that it made, where it turned them on the upright ones.

    Raises:
        ValueError: no method, two that change the batch, or one that is given twice.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        super().__init__(max((method.warmup for method in methods), default=0.0))
        changing = [method for method in methods if _changes(method)]
        if not methods:
            raise ValueError("a mixture needs at least one method, got none")
        if len(changing) > 1:
            names = " and ".join(type(method).__name__ for method in changing)
            raise ValueError(f"only one method of a mixture may change the batch, got {names}")
        if len({type(method) for method in methods}) < len(methods):
            raise ValueError(f"a method is given twice: {[type(method).__name__ for method in methods]}")
        self.methods = nn.ModuleList([*changing, *(method for method in methods if method not in changing)])
        self.changing = len(changing)
        # what one of them needs, the mixture needs
        needs: dict[str, object] = {
            name: any(getattr(method, name) for method in methods)
            for name in ("maps", "needs_teacher", "needs_widths", "needs_classes", "relational", "triplets")
        }
        needs["stages"] = max((method.stages for method in methods), key=("none", "last", "all").index)
        needs["most_layers"] = min((method.most_layers for method in methods if method.most_layers), default=None)
        for name, value in needs.items():  # class attributes of other methods
            setattr(self, name, value)

    @property
    def fixed_views(self) -> int:
        return self.parts[0].fixed_views

    @property
    def parts(self) -> list[Method]:
        return [method for method in self.methods if isinstance(method, Method)]

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        for part in self.parts:
            if part.needs_widths:
                if part.built:
                    raise ValueError(f"this {type(part).__name__} has heads for another Distillation already")
                part.build(*self._of(part, student, teacher))
                part.built = True

    def widths(self, student: Outputs, teacher: Outputs | None) -> tuple[list[int], list[int]]:
        all_of_them: tuple[list[int], list[int]] = [], []
        for part in self.parts:
            if part.needs_widths:
                for widths, more in zip(all_of_them, part.widths(*self._of(part, student, teacher)), strict=True):
                    widths += more
        return all_of_them

    def scaled_by(self, term: str) -> str:
        owner = next((part for part in self.parts if type(part).__name__.lower() == term), self.parts[0])
        return owner.scaled_by(term)

    def schedule(self, share: float) -> None:
        super().schedule(share)
        for part in self.parts:
            part.schedule(share)

    def prepare(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        return self.parts[0].prepare(images, target, target_neg)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        known: set[str] = set()
        for i, part in enumerate(self.parts):
            part.group = self.group
            if self.changing and i > 0:
                mine = part.terms(*self._of(part, *self._plain(student, teacher, batch)), _labels(batch))
            else:
                mine = part.terms(*self._of(part, student, teacher), batch)
            terms |= {name: term for name, term in mine.items() if name not in known}
            known |= {*mine, *part.includes}
        return terms

    def _plain(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> tuple[Outputs, Outputs | None]:
        """The rows of the images as they came, if the changing method made several of each."""
        images = len(_labels(batch).target)
        if len(student.logits) == images:
            return student, teacher
        rows = self.parts[0].own_rows(images)
        kept = [Outputs(x.logits[rows], [f[rows] for f in x.features]) for x in (student, teacher) if x is not None]
        return kept[0], kept[1] if len(kept) > 1 else None

    def _of(self, part: Method, student: Outputs, teacher: Outputs | None) -> tuple[Outputs, Outputs | None]:
        """The features that a method takes of those that all of them need; of layers with names it takes all."""
        if self.named_layers or part.stages == self.stages:
            return student, teacher
        kept = slice(-1, None) if part.stages == "last" else slice(0)
        student = student._replace(features=student.features[kept])
        return student, None if teacher is None else teacher._replace(features=teacher.features[kept])


def _changes(method: Method) -> bool:
    return method.triplets or type(method).prepare is not Method.prepare


def _labels(batch: Batch) -> Batch:
    """A label for each row: of a triplet's images, of the first of two mixed ones."""
    if batch.target_neg is None:
        return Batch(batch.images, batch.target)
    return Batch(batch.images, triplet_labels(batch.target, batch.target_neg))
