"""Intervals of a training recipe's numbers: over the seeds it was trained with and the questions it was asked."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class Estimate:
    """A number measured with several seeds on the same questions, and how it would vary with others of both.

    Seeds and questions are crossed random effects: every model answers every question. With y = number + seed + question
    + rest, the variance of the mean is (MS_seeds + MS_questions - MS_rest) / (S Q), and Satterthwaite's degrees of
    freedom go with it (Satterthwaite, "An approximate distribution of estimates of variance components", 1946). With
    three seeds this matters: an interval that resamples the seeds cannot leave their range.

    Args:
        value: the number.
        influence: how far each answer moves it, of shape (seeds, questions), mean 0. For a mean these are the deviations
            from it; for a ratio of totals, its linearization.
    """

    value: float
    influence: np.ndarray

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Return the difference on the same questions, seed by seed; one seed on either side is held against them all."""
        seeds, others = len(self.influence), len(other.influence)
        if self.influence.shape[1] != other.influence.shape[1] or (seeds != others and 1 not in (seeds, others)):
            raise ValueError(
                f"estimates over {self.influence.shape} and {other.influence.shape} seeds and questions have no paired "
                "difference: both need the same questions, and the same seeds or a single one"
            )
        return Estimate(self.value - other.value, self.influence - other.influence)

    @property
    def half_width(self) -> float:
        """Half the width of the 95% interval; 0 where no two answers differ."""
        seeds, questions = self.influence.shape
        if seeds == 1:
            spread = float(self.influence.var(ddof=1)) / questions
            return float(student.ppf(0.975, questions - 1)) * math.sqrt(spread)
        rows, columns = self.influence.mean(axis=1), self.influence.mean(axis=0)
        rest = ((self.influence - rows[:, None] - columns) ** 2).sum() / ((seeds - 1) * (questions - 1))
        # A component of variance is never negative, whatever its estimate.
        of_seeds = max(questions * (rows**2).sum() / (seeds - 1), rest)
        of_questions = max(seeds * (columns**2).sum() / (questions - 1), rest)
        total = of_seeds + of_questions - rest
        if total <= 0:
            return 0.0
        freedom = total**2 / (
            of_seeds**2 / (seeds - 1) + of_questions**2 / (questions - 1) + rest**2 / ((seeds - 1) * (questions - 1))
        )
        return float(student.ppf(0.975, freedom)) * math.sqrt(total / (seeds * questions))

    @property
    def by_seed(self) -> list[float]:
        """The number of each seed; for a ratio, in its linearization."""
        return [self.value + float(moved) for moved in self.influence.mean(axis=1)]

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the 95% interval."""
        return self.value - self.half_width, self.value + self.half_width


def ratio_of_totals(numerators: np.ndarray, denominators: np.ndarray | None = None) -> Estimate | None:
    """Return the sum of `numerators` over that of `denominators`; None where the latter is 0.

    Args:
        numerators: of shape (seeds, questions): a score of every answer.
        denominators: of the same shape, such as facts stated; ones by default, which makes it the mean.

    Raises:
        ValueError: fewer than two questions, or shapes that differ.
    """
    numerators = np.asarray(numerators, dtype=float)
    denominators = np.ones_like(numerators) if denominators is None else np.asarray(denominators, dtype=float)
    if numerators.ndim != 2 or numerators.shape[1] < 2 or numerators.shape != denominators.shape:
        raise ValueError(
            f"got {numerators.shape} numerators and {denominators.shape} denominators; both need the same shape, (seeds, "
            "questions), with two questions or more"
        )
    if not denominators.sum():
        return None
    value = numerators.sum() / denominators.sum()
    return Estimate(float(value), (numerators - value * denominators) / denominators.mean())
