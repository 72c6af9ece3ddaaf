"""The interval against its definition and published values."""

import math

import pytest

from mmoe.evaluate.statistics import Z_95, majority_share, wilson_interval


@pytest.mark.parametrize(("correct", "n"), [(1, 3), (5, 10), (81, 263), (499, 500), (250, 500)])
def test_the_ends_solve_the_defining_equation(correct: int, n: int) -> None:
    for end in wilson_interval(correct, n):
        assert abs(correct / n - end) == pytest.approx(Z_95 * math.sqrt(end * (1 - end) / n), rel=1e-12)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_edges() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0, abs=1e-12)


def test_majority_share() -> None:
    assert majority_share([" 1", " 2", " 2", " 3"]) == 0.5
    assert majority_share([]) == 0.0
