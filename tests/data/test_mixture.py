"""Reading mixtures, and every way in which one can be wrong."""

import pytest

from mmoe.data.mixture import Part, load_mixture
from mmoe.errors import UserError


def test_the_shipped_mixtures_are_readable():
    assert load_mixture("quickstart") == (Part(path="scenes/train", weight=1.0),)
    assert {part.path for part in load_mixture("scenes_and_stamps")} == {"scenes/train", "stamps/train"}
    capped = {part.path: (part.cap, bool(part.system_prompt)) for part in load_mixture("cambrian_tiny")}
    assert capped == {
        "scenes/train": (16_000, False),
        "cv_bench/train": (16_000, False),
        "stamps/train": (None, True),
    }


def test_a_mixture_of_ones_own(tmp_path):
    path = tmp_path / "m.toml"
    path.write_text('description = "d"\n[[source]]\npath = "a"\n[[source]]\npath = "b/train"\nweight = 3\n')
    assert load_mixture(str(path)) == (Part(path="a", weight=1.0), Part(path="b/train", weight=3.0))


def test_what_the_weights_count(tmp_path):
    path = tmp_path / "m.toml"
    path.write_text(
        'weights = "epochs"\n[[source]]\npath = "a"\ncap = 30\nweight = 2\n'
        '[[source]]\npath = "b"\nsystem_prompt = "say more"\n'
    )
    a, b = load_mixture(str(path))
    assert a == Part(path="a", weight=2.0, in_epochs=True, cap=30)
    assert b == Part(path="b", weight=1.0, in_epochs=True, system_prompt="say more")
    assert [(part.epoch(size), part.share(size)) for part in (a, b) for size in (29, 100)] == [
        (29, 58),
        (30, 60),
        (29, 29),
        (100, 100),
    ]
    path.write_text(path.read_text().replace("epochs", "samples"))
    assert [part.share(100) for part in load_mixture(str(path))] == [2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[source]\n", "no TOML"),
        ("", "names no data set"),
        ("source = 3", "names no data set"),
        ("[sources]", "unknown key 'sources'"),
        ('[[source]]\npath = "a"\nwieght = 1', "unknown key 'wieght'"),
        ("[[source]]\nweight = 1", "no path"),
        ('[[source]]\npath = "a"\nweight = 0', "weight of 'a' is 0"),
        ('[[source]]\npath = "a"\nweight = inf', "weight of 'a' is inf"),
        ('[[source]]\npath = "a"\nweight = true', "weight of 'a' is True"),
        ('[[source]]\npath = "a"\n[[source]]\npath = "a"', "named twice"),
        ('weights = "epoch"\n[[source]]\npath = "a"', "weights is 'epoch'"),
        ('[[source]]\npath = "a"\ncap = 0', "cap of 'a' is 0"),
        ('[[source]]\npath = "a"\ncap = true', "cap of 'a' is True"),
        ('[[source]]\npath = "a"\ncap = 2.5', "cap of 'a' is 2.5"),
        ('[[source]]\npath = "a"\nsystem_prompt = ""', "system_prompt of 'a' is ''"),
        ('[[source]]\npath = "a"\nsystem_prompt = 3', "system_prompt of 'a' is 3"),
        ('[[source]]\npath = "a"\nsystem_prompt = "<image>"', "holds <image>"),
    ],
)
def test_a_wrong_mixture_is_refused(tmp_path, text, message):
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_mixture(str(path))


def test_a_missing_mixture_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read the mixture"):
        load_mixture(str(tmp_path / "none.toml"))
    with pytest.raises(UserError, match="quickstart"):
        load_mixture("none")
