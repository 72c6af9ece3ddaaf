"""README's map names every folder, and what README names is there."""

import re
from pathlib import Path

import pytest


def folders(root: Path) -> list[str]:
    top = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    made = {"build", "dist", "runs", "data-cache", "mmoe.egg-info"}
    packages = [path for path in (root / "mmoe").iterdir() if (path / "__init__.py").exists()]
    names = [f"{path.name}/" for path in top if path.name not in {*made, "mmoe"}]
    return sorted(names + [f"mmoe/{path.name}/" for path in packages])


def test_every_folder_has_its_line(root: Path) -> None:
    table = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("| `")]
    named = {name for line in table for name in re.findall(r"`([\w/]+/)`", line.split("|")[1])}
    assert sorted(named) == folders(root)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/numerics.md"])
def test_named_files_exist(root: Path, page: str) -> None:
    text = (root / page).read_text()
    places = (root, root / "mmoe", root / "docs")
    for name in re.findall(r"[`(]((?:[\w.-]+/)+[\w.-]+\.(?:md|py|sh|png|toml|cpp))[`)]", text):
        assert any((place / name).exists() for place in places), f"{page} names {name}"


def test_the_two_commands_are_targets(root: Path) -> None:
    commands = re.findall(r"^    make (\w+)", (root / "README.md").read_text(), re.MULTILINE)
    assert commands == ["quickstart", "test"]
    for name in commands:
        assert re.search(rf"^{name}:", (root / "Makefile").read_text(), re.MULTILINE)
