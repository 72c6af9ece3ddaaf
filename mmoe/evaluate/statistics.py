"""How far an accuracy from n questions can be trusted, and what guessing would give."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Z_95 = 1.959963984540054
"""Two-sided 95% point of the normal distribution."""


def wilson_interval(correct: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a binomial share (Wilson 1927), as fractions.

    With p = correct / n it is the set of shares q with |p − q| ≤ z·√(q(1−q)/n): unlike p ± z·√(p(1−p)/n) it stays
    within [0, 1] and has a width at p = 0 and p = 1. Without questions nothing is known: (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    share, spread = correct / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def majority_share(answers: Sequence[Hashable]) -> float:
    """The share that always giving the most frequent answer would score; 0 without answers."""
    return max(Counter(answers).values()) / len(answers) if answers else 0.0
