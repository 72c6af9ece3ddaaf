"""Where the source cards and mixtures that come with mmoe lie."""

from pathlib import Path

from mmoe.errors import UserError


def shipped(kind: str, name: str) -> Path:
    """Path of the shipped file ``data/<kind>/<name>.toml``.

    Args:
        kind: ``"sources"`` or ``"mixtures"``.
        name: the file's stem.

    Raises:
        UserError: no such file ships.
    """
    package = Path(__file__).resolve().parent
    # A wheel carries the top-level data/ as mmoe/data/shipped/; a checkout has only the top-level folder.
    folder = next((path for path in (package / "shipped", package.parents[1] / "data") if path.is_dir()), package)
    path = folder / kind / f"{name}.toml"
    if Path(name).name != name or not path.is_file():
        names = sorted(file.stem for file in (folder / kind).glob("*.toml"))
        raise UserError(f"no shipped {kind[:-1]} is called {name!r}", "", f"there are {', '.join(names) or 'none'}")
    return path
