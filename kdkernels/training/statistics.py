"""Means over seeds, and differences that are paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Difference(NamedTuple):
    """The mean of differences, and its standard error: NaN for a single one."""

    mean: float
    error: float

    @property
    def clear(self) -> bool:
        """Above zero by more than two standard errors."""
        return self.mean > 2 * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ({self.error:.1f})" if math.isfinite(self.error) else f"{self.mean:+.1f}"


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample; NaN of a single value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """The difference to ``base`` over the seeds that both have; None if there are none."""
    differences = [value - base[seed] for seed, value in values.items() if seed in base]
    if not differences:
        return None
    return Difference(statistics.mean(differences), deviation(differences) / math.sqrt(len(differences)))


def mean_and_deviation(values: Sequence[float]) -> str:
    spread = deviation(values)
    return f"{statistics.mean(values):.1f}" + (f" ± {spread:.1f}" if math.isfinite(spread) else "")
