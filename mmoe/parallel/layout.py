"""Checks a parallel layout before any rank starts work."""

from collections.abc import Iterator

from mmoe.errors import UserError
from mmoe.recipe.checks import row_unit
from mmoe.recipe.model import SVA, Llama
from mmoe.recipe.schema import Parallel, Recipe


def data_parallel_size(parallel: Parallel, ranks: int) -> int:
    """Data-parallel ranks of the dense parameters: what tensor, pipeline and context parallelism leave over."""
    return ranks // (parallel.tensor * parallel.pipeline * parallel.context)


def possible_expert_sizes(experts: int, parallel: Parallel, ranks: int) -> list[int]:
    """Expert-parallel sizes that divide the experts, and the ranks that a pipeline stage leaves to them."""
    room = ranks // (parallel.pipeline * parallel.expert_tensor)
    return [size for size in range(1, room + 1) if room % size == 0 and experts % size == 0]


def check(recipe: Recipe, ranks: int) -> None:
    """Raises :class:`UserError` when ``recipe`` cannot run on ``ranks`` ranks, with the nearest layouts that can."""
    parallel = recipe.parallel
    dense = parallel.tensor * parallel.pipeline * parallel.context
    if ranks % dense:
        what = f"tensor × pipeline × context = {dense} does not divide {ranks} rank(s)"
        raise UserError(what, "parallel", f"start a multiple of {dense} ranks, or lower one of them")
    if ranks % (parallel.pipeline * parallel.expert_tensor):
        what = (
            f"pipeline × expert_tensor = {parallel.pipeline * parallel.expert_tensor} does not divide {ranks} rank(s)"
        )
        raise UserError(what, f"parallel.expert_tensor = {parallel.expert_tensor}", "lower it")
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("sequence parallelism needs tensor parallelism", "parallel.sequence = true", "set it to false")
    for key, value, what, of in _divisors(recipe):
        if of % value:
            near = ", ".join(str(size) for size in range(1, of + 1) if of % size == 0)
            raise UserError(f"{value} does not divide {what} = {of}", f"parallel.{key}", f"possible: {near}")
    _check_experts(recipe, ranks)
    _check_batch(recipe, ranks)
    _check_pipeline(recipe, ranks)


def _check_experts(recipe: Recipe, ranks: int) -> None:
    parallel, moe = recipe.parallel, recipe.model.moe
    if moe is None:
        for key in ("expert", "expert_tensor"):
            if getattr(parallel, key) > 1:
                what = f"the model has no experts to share out over {getattr(parallel, key)} ranks"
                raise UserError(what, f"parallel.{key}", "set it to 1")
        return
    width, unit = moe.expert_hidden_size // parallel.expert_tensor, row_unit(recipe)
    if width % unit:
        what = f"{width} columns of each expert on a rank are no multiple of {unit}, 16 bytes of the grouped GEMM"
        raise UserError(what, f"parallel.expert_tensor = {parallel.expert_tensor}", "lower it")
    sizes = possible_expert_sizes(moe.experts, parallel, ranks)
    if parallel.expert not in sizes:
        raise UserError(
            f"{moe.experts} experts do not fit {parallel.expert} expert-parallel ranks on {ranks} rank(s)",
            f"parallel.expert = {parallel.expert}",
            f"possible here: {', '.join(map(str, sizes))}",
        )


def _divisors(recipe: Recipe) -> Iterator[tuple[str, int, str, int]]:
    """(key, size, what it has to divide, that one's size)."""
    parallel, backbone = recipe.parallel, recipe.model.backbone
    for name in ("heads", "vocab_size", "ffn_hidden_size"):
        yield "tensor", parallel.tensor, f"model.backbone.{name}", getattr(backbone, name)
    if isinstance(backbone, Llama):
        yield "tensor", parallel.tensor, "model.backbone.kv_heads", backbone.kv_heads
    if recipe.model.moe:
        width = recipe.model.moe.expert_hidden_size
        yield "expert_tensor", parallel.expert_tensor, "model.moe.expert_hidden_size", width
    stages = parallel.pipeline * parallel.virtual_pipeline
    yield "pipeline × virtual_pipeline", stages, "model.backbone.layers", backbone.layers
    # Context parallelism cuts a pack into two pieces a rank, tensor parallelism cuts those of a rank for routing.
    pieces = parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1)
    yield "tensor × 2 context", pieces, "data.sequence_length", recipe.data.sequence_length


def _check_batch(recipe: Recipe, ranks: int) -> None:
    train, replicas = recipe.train, data_parallel_size(recipe.parallel, ranks)
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


def _check_pipeline(recipe: Recipe, ranks: int) -> None:
    parallel, train, model = recipe.parallel, recipe.train, recipe.model
    if parallel.pipeline > 1 and isinstance(model.backbone, Llama) and model.backbone.tied_embeddings:
        what = "tied embeddings stand on the first pipeline stage and on the last"
        raise UserError(what, f"parallel.pipeline = {parallel.pipeline}", "set it to 1, or untie them")
    inside = isinstance(model.connector, SVA) and model.connector.inside is not None
    if parallel.pipeline > 1 and inside:
        what = "SVA layers within the language model read the encoders' features, which are on the first stage alone"
        raise UserError(what, f"parallel.pipeline = {parallel.pipeline}", "set it to 1, or leave out connector.inside")
    if parallel.recompute == "full" and inside:
        what = "a layer computed again in the backward cannot send gradients to features that it was not given"
        raise UserError(what, 'parallel.recompute = "full"', 'use "selective", or leave out connector.inside')
    if parallel.virtual_pipeline == 1:
        return
    if parallel.pipeline == 1:
        what = "virtual pipeline stages need more than one pipeline stage"
        raise UserError(what, f"parallel.virtual_pipeline = {parallel.virtual_pipeline}", "set it to 1")
    micro_batches = train.global_batch // (train.micro_batch * data_parallel_size(parallel, ranks))
    if micro_batches % parallel.pipeline:
        # The interleaved schedule (Megatron-LM, arXiv 2104.04473, section 2.2) works in rounds of one a stage.
        what = f"{micro_batches} micro-batches a step are no multiple of {parallel.pipeline} pipeline stages"
        raise UserError(what, "train.global_batch", "the interleaved schedule needs one: change global_batch")
