"""First weights that depend on the seed and a parameter's name alone, never on the layout that holds it."""

import hashlib
from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mmoe.layers.roles import init_std, role_of
from mmoe.recipe.schema import Recipe


def draw(recipe: Recipe, key: str, place: tuple[int, ...], shape: Sequence[int]) -> Tensor:
    """The first weights of one whole matrix of the language model, fp32 of ``shape``, from N(0, σ²) with its role's σ.

    Args:
        recipe: gives the seed and σ.
        key: its name in a distributed checkpoint, which the matrices of all layers and experts have in common.
        place: its layer, where that has the key in common with others, and its expert, where it is one's.
        shape: without these.
    """
    digest = hashlib.sha256(f"{recipe.train.seed} {key} {place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(tuple(shape), generator=generator) * init_std(role_of(key), recipe)


@torch.no_grad()
def initialise(model: MegatronModule, recipe: Recipe) -> None:
    """Draws every matrix of the language model in ``model``, a pipeline stage of any layout, from N(0, σ²) with its
    role's σ (:mod:`mmoe.layers.roles`). Norm weights, biases and vision modules keep what they have.

    A rank draws a whole matrix, or for the experts one expert's, and keeps its part.
    """
    state = model.sharded_state_dict()
    apply_factories(state)
    for part in nested_values(state):
        if not isinstance(part, ShardedTensor) or (role := role_of(part.key)) in ("vector", "vision"):
            continue
        # Axes in front of the matrix itself: its layer, which the tensor here lacks, and its expert.
        layers, experts = part.prepend_axis_num, int(role in ("expert_in", "expert_out"))
        shape, first = part.global_shape[layers + experts :], part.global_offset
        if len(shape) < 2:
            continue
        data = part.data
        assert data is not None
        for expert, member in enumerate(data if experts else [data]):
            place = (*first[:layers], first[layers] + expert) if experts else first[:layers]
            whole = draw(recipe, part.key, place, shape)
            starts = zip(first[layers + experts :], member.shape, strict=True)
            member.copy_(whole[tuple(slice(start, start + size) for start, size in starts)])
