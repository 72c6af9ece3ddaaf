"""What the ranks of test_preflight.py run; one of them is made odd."""

import contextlib
import dataclasses
import io
import time
from pathlib import Path
from typing import Any
from unittest import mock

from mmoe import preflight
from mmoe.errors import UserError
from mmoe.parallel import engine
from mmoe.recipe import load_recipe
from mmoe.recipe.schema import Parallel

ODD = {
    "clock": {"now": lambda: time.time() + 3600},
    "code": {"code": lambda: "0" * 64},
    "version": {"version": lambda package: "0.0"},
}


def compare(odd: int, what: str, out: str, whole: bool = False) -> dict[str, Any]:
    """What a rank returns, prints or raises when rank ``odd`` has another ``what``; ``whole`` with the bandwidths."""
    mine = engine.start(Parallel(), seed=0).rank == odd
    recipe = load_recipe("quickstart")
    if mine and what == "recipe":
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=7))
    said = io.StringIO()
    with mock.patch.dict(vars(preflight), ODD.get(what, {}) if mine else {}), contextlib.redirect_stdout(said):
        try:
            if not whole:
                return {"warnings": preflight.agree(recipe, Path(out))}
            preflight.run(recipe, Path(out))
            return {"said": said.getvalue()}
        except UserError as error:
            return {"error": str(error), "said": said.getvalue()}
