"""Reading mixtures, and every way in which one can be wrong."""

import pytest

from mmoe.data.mixture import Part, load_mixture
from mmoe.errors import UserError


def test_the_shipped_mixtures_are_readable():
    assert load_mixture("quickstart") == (Part(path="scenes/train", weight=1.0),)
    assert {part.path for part in load_mixture("scenes_and_stamps")} == {"scenes/train", "stamps/train"}


def test_a_mixture_of_ones_own(tmp_path):
    path = tmp_path / "m.toml"
    path.write_text('description = "d"\n[[source]]\npath = "a"\n[[source]]\npath = "b/train"\nweight = 3\n')
    assert load_mixture(str(path)) == (Part(path="a", weight=1.0), Part(path="b/train", weight=3.0))


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
