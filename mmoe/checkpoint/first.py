"""A recipe's first weights, those that `mmoe train` begins with, without the model in memory."""

import hashlib
import math
from collections.abc import Collection

import torch
from torch import Tensor

from mmoe.checkpoint.tensors import Memory, Spec, Tensors, Together
from mmoe.layers.initialise import draw
from mmoe.layers.roles import role_of
from mmoe.models.vision import build_vision
from mmoe.parallel import engine
from mmoe.parallel.state import Place
from mmoe.recipe.schema import Parallel, Recipe

LANGUAGE = "language"


def first_weights(recipe: Recipe, modules: Collection[str], places: dict[str, Place]) -> Tensors:
    """Those of ``modules`` ("language", "connector", "encoders.clip", …), fp32.

    Encoders and connector are in memory, the others but for one at a time while they are made: the random numbers of
    each come behind those of the ones before it. The language model's are drawn when they are asked for.

    Args:
        recipe: one without stages.
        modules: whose first weights are wanted.
        places: of every weight of the whole model (:func:`mmoe.parallel.state.places`).
    """
    known = hashlib.sha256(repr((recipe.model, recipe.train.seed, recipe.transfer, torch.__version__)).encode())
    found: dict[str, Tensor] = {}
    if any(name != LANGUAGE for name in modules):
        with torch.random.fork_rng():  # the caller's random numbers stay as they were
            engine.start(Parallel(), recipe.train.seed, alone=True)
            for name, module in build_vision(recipe.model):
                if name in modules:
                    found |= {f"{name}.{part}": tensor for part, tensor in module.state_dict().items()}
    language = {name: place for name, place in places.items() if name.startswith(f"{LANGUAGE}.")}
    drawn = _Drawn(recipe, language if LANGUAGE in modules else {}, known.hexdigest())
    return Together([Memory(found, known.hexdigest()), drawn])


class _Drawn(Tensors):
    """The language model's: matrices by their name and the seed, norms one and biases zero."""

    def __init__(self, recipe: Recipe, places: dict[str, Place], known: str) -> None:
        self.recipe, self.places, self.known = recipe, places, known
        self.specs = {name: Spec(place.tensor.shape, torch.float32) for name, place in places.items()}
        self.last: tuple[object, Tensor] | None = None

    def read(self, name: str, start: int, out: Tensor) -> None:
        place, role = self.places[name], role_of(self.places[name].key)
        experts = int(role in ("expert_in", "expert_out"))
        shape = place.whole[len(place.leading) + experts :]
        if len(shape) < 2 or role == "vector":
            out.fill_(float(role == "vector"))
            return
        size, done = math.prod(shape), 0
        while done < out.numel():
            expert, first = divmod(start + done, size)
            count = min(size - first, out.numel() - done)
            whole = self._matrix(place.key, (*place.leading, expert) if experts else place.leading, shape)
            out[done : done + count] = whole[first : first + count]
            done += count

    def _matrix(self, key: str, place: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """All elements of one; the last one that was asked for is kept, since it is read in stretches."""
        if self.last is None or self.last[0] != (key, place):
            self.last = None  # never two in memory
            self.last = (key, place), draw(self.recipe, key, place, shape).view(-1)
        return self.last[1]

    def fingerprint(self) -> str:
        return self.known
