import dataclasses
import itertools

import pytest
import small

from mmoe.recipe.schema import Optimizer
from mmoe.train.schedule import batch_factor, bias_rate, learning_rate


def test_warm_up_then_cosine() -> None:
    settings = Optimizer(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(settings, step, 24) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == 0.55
    assert 0.1 < rates[-1] < 0.12
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_no_warm_up() -> None:
    assert learning_rate(Optimizer(lr=2.0), 0, 10) == 2.0


def test_rates_follow_the_root_of_the_batch() -> None:
    settings = Optimizer(lr=4e-5, reference_batch=512)
    assert batch_factor(settings, 512) == 1.0
    assert batch_factor(settings, 2048) * settings.lr == 8e-5
    assert batch_factor(settings, 128) == 0.5
    assert batch_factor(Optimizer(lr=4e-5), 128) == 1.0


def test_bias_rate_stays_or_decays() -> None:
    settings = dataclasses.replace(small.MIXTURE, bias_rate=0.1)
    assert [bias_rate(settings, step, 11) for step in (0, 5, 10)] == [0.1] * 3
    decaying = [bias_rate(dataclasses.replace(settings, bias_rate_min=0.02), step, 11) for step in range(11)]
    assert decaying[0] == 0.1
    assert decaying[5] == pytest.approx(0.06)
    assert decaying[10] == pytest.approx(0.02)
    assert all(a > b for a, b in itertools.pairwise(decaying))
    assert bias_rate(dataclasses.replace(settings, bias_rate_min=0.02), 0, 1) == 0.1
