"""What several seeds say: a mean with its interval, and whether two configurations differ by more than noise."""

from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """mean +- half, the 95 % interval of a mean (Student, Biometrika 1908); half is None of a single number."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")

    @property
    def differs_from_zero(self) -> bool:
        """Whether zero is outside; never of a single number."""
        return self.half is not None and abs(self.mean) > self.half


def interval(values: list[float]) -> Interval:
    """The mean of independent runs with its 95 % interval. Raises ValueError without values."""
    if not values:
        raise ValueError("an interval needs at least one value")
    n = len(values)
    if n == 1:
        return Interval(values[0], None)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / n**0.5
    return Interval(float(np.mean(values)), float(half))


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Interval | None:
    """Ours less theirs, seed by seed, which takes out what a seed does to both; None if they share no seed."""
    shared = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in shared]) if shared else None
