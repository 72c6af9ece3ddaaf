"""The order against a plain reading of its definition, and the properties it promises."""

import numpy as np
import pytest

from mmoe import _host
from mmoe.data.order import PERIOD, Order, key, shares

WORD = (1 << 64) - 1


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def permute(index: int, size: int, secret: int) -> int:
    half = 1
    while 4**half < size:
        half += 1
    round_keys = []
    for _ in range(6):
        secret = mix((secret + 0x9E3779B97F4A7C15) & WORD)
        round_keys.append(secret)
    while True:
        left, right = divmod(index, 2**half)
        for round_key in round_keys:
            left, right = right, left ^ mix((right + round_key) & WORD) % 2**half
        index = left * 2**half + right
        if index < size:
            return index


def blend(counts: list[int]) -> tuple[list[int], list[int]]:
    taken, source, rank = [0] * len(counts), [], []
    for i in range(sum(counts)):
        lag = [count * (i + 1) - sum(counts) * t for count, t in zip(counts, taken, strict=True)]
        best = lag.index(max(lag))
        source.append(best)
        rank.append(taken[best])
        taken[best] += 1
    return source, rank


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000])
def test_permutation_is_a_bijection_and_matches_the_definition(size):
    for secret in (0, 1, WORD):
        got = _host.permute(np.arange(size), size, secret)
        assert sorted(got.tolist()) == list(range(size))
        assert got.tolist() == [permute(i, size, secret) for i in range(size)]


def test_permutation_of_a_large_set_at_any_index():
    size = 10**12 + 39
    index = np.array([0, 1, 10**6, size - 1])
    assert _host.permute(index, size, 7).tolist() == [permute(int(i), size, 7) for i in index]


def test_permutation_looks_random():
    size = 10_000
    got = _host.permute(np.arange(size), size, 3)
    # In a random permutation the neighbours' correlation has deviation 1/√n = 0.01; one place stays on average.
    assert abs(np.corrcoef(got[:-1], got[1:])[0, 1]) < 0.05
    assert (got == np.arange(size)).sum() < 10
    assert (got == _host.permute(np.arange(size), size, 4)).sum() < 10


@pytest.mark.parametrize("index", [-1, 5])
def test_permutation_refuses_what_is_outside(index):
    with pytest.raises(IndexError):
        _host.permute(np.array([index]), 5, 0)


@pytest.mark.parametrize("counts", [[1], [3, 1], [1, 1, 1], [97, 2, 1], [50, 30, 15, 5]])
def test_blend_matches_the_definition(counts):
    source, rank = _host.blend(np.array(counts))
    assert (source.tolist(), rank.tolist()) == blend(counts)


def test_blend_is_even_everywhere():
    counts = shares([0.5, 0.3, 0.15, 0.05])
    source, _ = _host.blend(counts)
    seen = np.cumsum(source[:, None] == np.arange(4), axis=0)
    due = np.arange(1, PERIOD + 1)[:, None] * counts / PERIOD
    assert np.abs(seen - due).max() < 2
    assert (seen[-1] == counts).all()


@pytest.mark.parametrize("weights", [[1], [1, 1, 1], [1, 1e-9], [1e-9, 1e-9, 5], [0.99, 0.01], [3] * 7])
def test_shares_sum_to_the_period_in_proportion(weights):
    counts = shares(weights)
    assert counts.sum() == PERIOD
    assert counts.min() >= 1
    assert np.abs(counts - np.array(weights) / np.sum(weights) * PERIOD).max() <= len(weights)


def test_any_stretch_of_the_stream_is_the_same_however_it_is_read():
    order = Order(["a", "b"], [70, 11], [2.0, 1.0], seed=5)
    source, sample = order.at(0, 1000)
    for start, count in [(0, 1), (17, 300), (999, 1), (500, 500)]:
        s, x = order.at(start, count)
        assert (s == source[start : start + count]).all()
        assert (x == sample[start : start + count]).all()


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own():
    order = Order(["a", "b"], [70, 11], [2.0, 1.0], seed=5)
    source, sample = order.at(0, 3000)
    epochs = [sample[source == 0][70 * e : 70 * (e + 1)].tolist() for e in range(4)]
    assert all(sorted(epoch) == list(range(70)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sorted(sample[source == 1][11:22].tolist()) == list(range(11))


def test_a_short_epoch_has_its_samples_once_and_is_drawn_anew_from_the_whole_source():
    order = Order(["a", "b"], [70, 11], [2.0, 1.0], seed=5, epochs=[20, 11])
    source, sample = order.at(0, 3000)
    turns = sample[source == 0].tolist()
    assert turns == [permute(n % 20, 70, key(5, "a", n // 20)) for n in range(2000)]
    epochs = [set(turns[20 * e : 20 * (e + 1)]) for e in range(100)]
    assert all(len(epoch) == 20 for epoch in epochs)
    assert set().union(*epochs) == set(range(70))
    # A sample comes 100 · 20/70 times, with a deviation of √(100 · 2/7 · 5/7) = 4.5.
    assert all(28.6 - 5 * 4.5 < turns.count(i) < 28.6 + 5 * 4.5 for i in range(70))
    whole = Order(["a", "b"], [70, 11], [2.0, 1.0], seed=5).at(0, 3000)[1]
    assert (whole[source == 1] == sample[source == 1]).all()


def test_the_stream_goes_on_beyond_the_blends_period():
    order = Order(["a", "b"], [10**9, 10**9], [3.0, 1.0], seed=0)
    source, sample = order.at(PERIOD - 500, 1000)
    assert len(set(zip(source.tolist(), sample.tolist(), strict=True))) == 1000
    turns = [permute(i, 10**9, key(0, "b", 0)) for i in range((PERIOD - 500) // 4, (PERIOD + 500) // 4)]
    assert sample[source == 1].tolist() == turns


def test_a_sources_order_depends_on_its_name_and_the_seed_alone():
    alone = Order(["b"], [50], [1.0], seed=1).at(0, 50)[1]
    source, sample = Order(["a", "b"], [9, 50], [1.0, 2.0], seed=1).at(0, 75)
    assert sample[source == 1].tolist() == alone.tolist()
    assert Order(["b"], [50], [1.0], seed=2).at(0, 50)[1].tolist() != alone.tolist()
