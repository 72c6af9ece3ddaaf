"""Checks a parallel layout before any rank starts work."""

from mmoe.errors import UserError
from mmoe.recipe.schema import Parallel, Recipe

NOT_YET = {
    "tensor": "tensor parallelism",
    "pipeline": "pipeline parallelism",
    "virtual_pipeline": "virtual pipeline stages",
    "expert_tensor": "expert tensor parallelism",
    "context": "context parallelism",
}


def data_parallel_size(parallel: Parallel, ranks: int) -> int:
    """Data-parallel ranks of the dense parameters: what tensor, pipeline and context parallelism leave over."""
    return ranks // (parallel.tensor * parallel.pipeline * parallel.context)


def possible_expert_sizes(experts: int, ranks: int) -> list[int]:
    """Expert-parallel sizes that divide both the ranks and the experts."""
    return [size for size in range(1, ranks + 1) if ranks % size == 0 and experts % size == 0]


def check(recipe: Recipe, ranks: int) -> None:
    """Raises :class:`UserError` when ``recipe`` cannot run on ``ranks`` ranks, with the nearest layouts that can."""
    parallel, train = recipe.parallel, recipe.train
    for key, name in NOT_YET.items():
        if getattr(parallel, key) != 1:
            raise UserError(
                f"{name} is not built yet",
                f"parallel.{key} = {getattr(parallel, key)}",
                "set it to 1 and use parallel.expert",
            )
    if parallel.sequence:
        raise UserError("sequence parallelism needs tensor parallelism", "parallel.sequence = true", "set it to false")
    sizes = possible_expert_sizes(recipe.model.moe.experts, ranks)
    if parallel.expert not in sizes:
        raise UserError(
            f"{recipe.model.moe.experts} experts do not fit {parallel.expert} expert-parallel ranks on {ranks} rank(s)",
            f"parallel.expert = {parallel.expert}",
            f"possible here: {', '.join(map(str, sizes))}",
        )
    replicas = data_parallel_size(parallel, ranks)
    unit = train.micro_batch * replicas
    if train.global_batch % unit:
        below = train.global_batch // unit * unit
        near = [str(size) for size in (below, below + unit) if size]
        raise UserError(
            f"a global batch of {train.global_batch} packs cannot be split into micro-batches of {train.micro_batch} "
            f"on {replicas} data-parallel rank(s)",
            "train.global_batch",
            f"nearest that fit: {', '.join(near)}; or change train.micro_batch or the number of ranks",
        )
