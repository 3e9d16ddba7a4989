"""Confidence intervals of proportions."""

import math

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
