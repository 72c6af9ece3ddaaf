"""What the language models' ``config.json`` have in common."""

from typing import Any

from mmoe.errors import UserError


def rope_of(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Its rotary parameters, of whichever name.

    Raises:
        UserError: they are no table, or not of the plain kind.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters is {rope!r}", where, "export the model again")
    only({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, {"rope_type": "default"}, where)
    return rope


def only(config: dict[str, Any], supported: dict[str, Any], where: str) -> None:
    """Raises :class:`UserError` for a field that is there with another value than the one that is supported."""
    for name, value in supported.items():
        if config.get(name, value) != value:
            raise UserError(f"{name} is {config[name]!r}", where, f"only {value!r} is supported")
