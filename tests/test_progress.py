"""Lines of progress without a terminal."""

import itertools

import pytest

from mmoe import progress


@pytest.mark.parametrize(
    ("unit", "total", "step", "line"),
    [
        (progress.GB, 10**10, 10**9, "work: 2.0 of 10.0 GB, 0.17 GB/s, 0:48 left"),
        (progress.IMAGES, 1000, 100, "work: 200 of 1000 images, 16.7 images/s, 0:48 left"),
    ],
)
def test_a_line_every_ten_seconds(monkeypatch, capsys, unit, total, step, line):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress("work", total, unit) as advance:
        for now[0] in itertools.islice(itertools.count(6.0, 6.0), 3):
            advance(step)
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_silent_one_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.progress("work", 10, progress.IMAGES, silent=True) as advance:
        advance(10)
    assert capsys.readouterr().err == ""
