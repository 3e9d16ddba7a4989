"""Confidence intervals of proportions, and two models compared on the same questions."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964  # two-sided 95% quantile of the normal distribution


def wilson(right: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95% score interval of `right / count`, both ends in [0, 1].

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
    lost = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    won = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    differing, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(differing, count) for count in range(fewer + 1))
    return lost, won, min(1.0, 2 * tail / 2**differing)
