"""
Confidence intervals of proportions, two models compared on the same questions, and several seeds on the same questions.

scipy is imported where it is used: most commands that print an interval need none of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959964  # two-sided 95% quantile of the normal distribution


def wilson(right: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95% score interval of `right / count`, both ends in [0, 1]; `right` may be a sum of part marks.

    Raises:
        ValueError: no observation.
    """
    if count < 1:
        raise ValueError(f"count is {count}; an interval needs at least one observation")
    share = right / count
    centre = share + Z95**2 / (2 * count)
    spread = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def clustered_ratio(scores: Sequence[float], clusters: Sequence[str]) -> float:
    """Return the standard error of a mean with clusters, over that of independent scores.

    The sandwich estimator: deviations from the mean are summed within a cluster before they are squared.

    Args:
        scores: of each question.
        clusters: what questions share whose scores may depend on each other.

    Raises:
        ValueError: lists of different lengths, or scores that are all alike, whose error is 0.
    """
    if len(scores) != len(clusters) or len(set(scores)) < 2:
        raise ValueError(
            f"got {len(scores)} scores, {len(set(scores))} of them distinct, and {len(clusters)} clusters; "
            "give each score its cluster, and scores that differ"
        )
    deviations = np.subtract(scores, np.mean(scores))
    # Within a cluster, deviations to either side cancel before they are squared; between clusters they do not.
    _, places = np.unique(list(clusters), return_inverse=True)
    sums = np.bincount(places, weights=deviations)
    return float(np.sqrt((sums**2).sum() / (deviations**2).sum()))


def paired_difference(first: list[bool], second: list[bool]) -> tuple[float, float]:
    """Return the mean of `second - first` on the same questions and the half-width of its 95% interval.

    Raises:
        ValueError: lists of different lengths, or fewer than two questions.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"got {len(first)} and {len(second)} outcomes; paired outcomes need equal lengths of at least 2"
        )
    # 1 where only the second is right, -1 where only the first is.
    differences = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    return mean, Z95 * math.sqrt(variance / len(differences))


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of `second - first` on the same questions and the ends of its 95% percentile bootstrap interval.

    Args:
        first: a score of each question.
        second: another model's score of the same questions, in the same order.
        samples: times that the questions are drawn anew, with replacement.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ValueError: lists of different lengths, or fewer than two questions.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"got {len(first)} and {len(second)} scores; paired scores need equal lengths of at least 2")
    differences = np.subtract(second, first, dtype=float)
    generator = np.random.default_rng(seed)
    values, counts = np.unique(differences, return_counts=True)
    # Drawing n questions with replacement is drawing how often each distinct difference comes up.
    drawn = generator.multinomial(len(differences), counts / len(differences), size=samples)
    low, high = np.quantile(drawn @ values / len(differences), (0.025, 0.975))
    return float(differences.mean()), float(low), float(high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """Return how many questions went from right to wrong, from wrong to right, and the exact two-sided p-value.

    McNemar's test, exact form: were both models equally good, a question on which they differ would go either way with
    probability one half.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"got {len(first)} and {len(second)} outcomes; paired outcomes need equal lengths")
    lost = won = 0
    for before, after in zip(first, second, strict=True):
        if before and not after:
            lost += 1
        elif after and not before:
            won += 1
    if lost + won == 0:
        return 0, 0, 1.0  # scipy's test wants at least one trial
    from scipy.stats import binomtest

    return lost, won, float(binomtest(lost, lost + won, 0.5).pvalue)


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
        from scipy.stats import t as student

        seeds, questions = self.influence.shape
        if seeds == 1:
            # Nothing is known of other seeds: Student's interval over the questions alone.
            spread = float(self.influence.var(ddof=1)) / questions
            return float(student.ppf(0.975, questions - 1)) * math.sqrt(spread)
        rows, columns = self.influence.mean(axis=1), self.influence.mean(axis=0)
        # What neither the seed nor the question explains.
        rest = ((self.influence - rows[:, None] - columns) ** 2).sum() / ((seeds - 1) * (questions - 1))
        # A component of variance is never negative, whatever its estimate.
        of_seeds = max(questions * (rows**2).sum() / (seeds - 1), rest)
        of_questions = max(seeds * (columns**2).sum() / (questions - 1), rest)
        total = of_seeds + of_questions - rest
        if total <= 0:
            return 0.0
        # Satterthwaite: the degrees of freedom of a sum of mean squares, each with its own.
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
    if denominators is None:
        denominators = np.ones_like(numerators)
    denominators = np.asarray(denominators, dtype=float)
    if numerators.ndim != 2 or numerators.shape[1] < 2 or numerators.shape != denominators.shape:
        raise ValueError(
            f"got {numerators.shape} numerators and {denominators.shape} denominators; both need the same shape, (seeds, "
            "questions), with two questions or more"
        )
    if not denominators.sum():
        return None
    value = numerators.sum() / denominators.sum()
    # The ratio's first-order change by each answer (the delta method); for a mean these are the deviations from it.
    return Estimate(float(value), (numerators - value * denominators) / denominators.mean())
