"""What the ranks of a pool run: a small multimodal model, trained a few steps at some layout."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
import training

from mmoe.checkpoint.load import blank, hand_over
from mmoe.checkpoint.shards import Shards
from mmoe.layers import mla
from mmoe.models.multimodal import MultimodalModel, build_stages
from mmoe.parallel import engine, layout, state
from mmoe.parallel import optimizer as adam
from mmoe.recipe import model as tables
from mmoe.recipe import schema
from mmoe.recipe.load import dump_recipe
from mmoe.recipe.tokens import OURS
from mmoe.train.metrics import gradient_ratio
from mmoe.train.step import Outcome, Stepper

# isort: split
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories

PACK, MICRO, GLOBAL, GRID = 32, 2, 8, 2
# Or so short a pack would be attended to at once.
mla.LEAST_QUERIES = 8


def longcat() -> tables.Model:
    """A model with everything that a layout can cut: 4 layers, 4 heads, 4 experts beside 2 zero experts, images."""
    backbone = tables.Longcat(
        vocab_size=64, hidden_size=32, layers=4, heads=4, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, ffn_hidden_size=48, init_std=0.1, residual_init_std=0.1,
        hidden_z_coefficient=1e-3,
    )  # fmt: skip
    moe = tables.MoE(
        experts=4, zero_experts=2, top_k=3, expert_hidden_size=16, routed_scaling_factor=2.0, active_experts=1.5,
        balance_coefficient=0.1, balance_groups=2, bias_rate=0.02, router_init_std=0.5,
    )  # fmt: skip
    vit = tables.ViT(name="vit", type="vit", image_size=16, patch_size=4, width=16, layers=1, heads=2)
    connector = tables.SVA(grid=GRID, width=16, heads=2)
    return tables.Model(backbone=backbone, moe=moe, mtp=tables.MTP(), encoders=(vit,), connector=connector)


def dense() -> tables.Model:
    """A dense model with two encoders, SVA within the language model, and a token that ends each row of an image."""
    backbone = tables.Llama(
        type="llama", vocab_size=64, hidden_size=32, layers=4, heads=4, kv_heads=2, head_dim=8, ffn_hidden_size=48,
        init_std=0.1, residual_init_std=0.1,
    )  # fmt: skip
    fine = tables.ViT(name="fine", type="vit", image_size=16, patch_size=4, width=16, layers=1, heads=2)
    coarse = tables.ViT(name="coarse", type="vit", image_size=16, patch_size=8, width=16, layers=1, heads=2)
    inside = tables.Inside(start=0, stride=2, layers=2)
    connector = tables.SVA(grid=GRID, width=16, heads=2, newline=True, inside=inside)
    return tables.Model(backbone=backbone, encoders=(fine, coarse), connector=connector)


MODELS = {"longcat": longcat, "dense": dense}


def recipe(kind: str = "longcat", frozen: tuple[str, ...] = (), **parallel: Any) -> schema.Recipe:
    """Of one of :data:`MODELS`, with some of it frozen."""
    return schema.Recipe(
        name="layouts",
        model=MODELS[kind](),
        data=schema.Data(mixture="none", sequence_length=PACK),
        train=schema.Train(steps=10, global_batch=GLOBAL, micro_batch=MICRO, frozen=frozen),
        optimizer=schema.Optimizer(lr=1e-3, eps=1e-4),
        parallel=schema.Parallel(**parallel),
    )


def micro_batch(step: int, index: int, images: int = 3, image_tokens: int = GRID**2) -> dict[str, Any]:
    """Two packs: one of two documents, images and branches, one that ends in padding. Some have no image."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    images = 0 if index % 4 == 3 else images
    tokens = torch.randint(4, 64, (MICRO, PACK), generator=generator)
    document = torch.ones(MICRO, PACK, dtype=torch.int32)
    branch = torch.zeros(MICRO, PACK, dtype=torch.int32)
    document[0, 18:], document[1, 27:] = 2, 0
    branch[0, 10:14], branch[0, 14:18], branch[1, 20:27] = 1, 2, 1
    position = torch.arange(PACK).repeat(MICRO, 1)
    position[0, 14:18] -= 4
    position[0, 18:] -= 18
    for image, (pack, place) in enumerate(((0, 2), (0, 19), (1, 5))[:images]):
        tokens[pack, place : place + image_tokens] = OURS.image
        del image
    loss_mask = (torch.rand(MICRO, PACK, generator=generator) < 0.6).float() * (document > 0)
    return {
        "tokens": torch.where(document > 0, tokens, 0),
        "labels": torch.randint(4, 64, (MICRO, PACK), generator=generator),
        "loss_mask": loss_mask,
        "position": position,
        "document": document,
        "branch": branch,
        "images": {16: torch.rand(images, 3, 16, 16, generator=generator)},
        "original_sizes": torch.full((images, 2), 16),
        "samples": [["a"]] * MICRO,
        "skipped": [],
    }


def batches(step: int, image_tokens: int = GRID**2) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step: the same eight packs at every layout."""
    here = engine.ranks()
    numbers = range(here.data_rank, GLOBAL // MICRO, here.data_size)
    return [micro_batch(step, index, image_tokens=image_tokens) for index in numbers]


Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]


def pieces(models: list[MultimodalModel], *, gradients: bool) -> Pieces:
    """(name, shape of the whole, where this part begins, part) of every parameter, or of its gradient."""
    found: Pieces = []
    for model in models:
        sharded = model.sharded_state_dict()
        for part in nested_values(sharded):
            if gradients and isinstance(part, ShardedTensor | ShardedTensorFactory):
                part.data = getattr(part.data, "main_grad", None)
        apply_factories(sharded)
        for part in nested_values(sharded):
            if isinstance(part, ShardedTensor) and part.data is not None:
                data = part.data.detach().clone().view(*[1] * part.prepend_axis_num, *part.local_shape)
                found.append((part.key, tuple(part.global_shape), tuple(part.global_offset), data))
    return found


def train(
    steps: int = 5,
    first: int = 0,
    save: tuple[int, str] | None = None,
    load: str | None = None,
    kind: str = "longcat",
    frozen: tuple[str, ...] = (),
    **parallel: Any,
) -> dict[str, Any]:
    """Losses, gradient norms and routing of ``steps`` steps from step ``first``; the first one's gradients and the last
    weights. ``save`` = (after which step, folder); ``load``: the folder to go on from."""
    settings = recipe(kind, frozen, **parallel)
    layout.check(settings, engine.announced()[1])
    here = engine.start(settings.parallel, 0)
    torch.use_deterministic_algorithms(True)
    stepper = Stepper(settings, build_stages(settings))
    if load:
        state.load(Path(load), stepper.wrapped, stepper.optimizer)
    gradients: Pieces = []
    update = adam.update

    def watched(optimizer: Any, rate: float) -> tuple[bool, float]:
        if not gradients and not settings.parallel.distributed_optimizer and not frozen:
            gradients.extend(pieces(stepper.models, gradients=True))
        return update(optimizer, rate)

    adam.update = watched
    try:
        outcomes: list[Outcome] = []
        for step in range(first, first + steps):
            outcomes.append(
                stepper.step(iter(batches(step, settings.model.image_tokens)), settings.optimizer.lr, measure=True)
            )
            if save and save[0] == step + 1:
                if here.first:
                    Path(save[1]).mkdir()
                engine.barrier()
                training.save_state(Path(save[1]), stepper)
    finally:
        adam.update = update
    assert all(outcome.taken for outcome in outcomes)
    moe = settings.model.moe
    return {
        "loss": [outcome.loss for outcome in outcomes],
        "grad_norm": [outcome.grad_norm for outcome in outcomes],
        "balance_loss": [outcome.balance_loss for outcome in outcomes],
        "hidden_z_loss": [outcome.hidden_z_loss for outcome in outcomes],
        "mtp_loss": [outcome.mtp_loss for outcome in outcomes],
        "gradient_ratio": [gradient_ratio(outcome.tallies, moe) if moe else 0.0 for outcome in outcomes],
        "row_similarity": [outcome.row_similarity for outcome in outcomes],
        "tallies": [outcome.tallies for outcome in outcomes],
        "counts": [(outcome.tokens, outcome.samples) for outcome in outcomes],
        "gradients": gradients,
        "weights": pieces(stepper.models, gradients=False),
    }


def read(folder: str, **parallel: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a state as conversion reads it: some elements at a time, without a model."""
    places = state.places(blank(recipe(**parallel)))
    tensors, found = Shards(Path(folder), places, ""), {}
    for name, place in places.items():
        spec = tensors.specs[name]
        flat = torch.full((spec.numel,), torch.nan, dtype=spec.dtype)
        for start in range(0, spec.numel, 999):
            tensors.read(name, start, flat[start : start + 999])
        whole = found.setdefault(place.key, torch.full(place.whole, torch.nan, dtype=spec.dtype))
        whole[place.leading] = flat.view(spec.shape)
    return found


def grow(folder: str, **parallel: Any) -> dict[str, Any]:
    """Hands the model on to a stage of larger images: the grid's sizes behind it, the positions before and after, and
    that a step is taken."""
    small = recipe(**parallel)
    here = engine.start(small.parallel, 0)
    stepper = Stepper(small, build_stages(small))
    if here.first:
        (Path(folder) / "state").mkdir()
        (Path(folder) / "recipe.toml").write_text(dump_recipe(small))
    engine.barrier()
    training.save_state(Path(folder) / "state", stepper)
    vit = dataclasses.replace(small.model.encoders[0], image_size=32, grid=4)
    large = dataclasses.replace(small, model=dataclasses.replace(small.model, encoders=(vit,)))
    models = build_stages(large)
    hand_over(Path(folder), models)
    positions = [m.encoders["vit"].position.detach().clone() for m in (stepper.models[0], models[0]) if m.pre_process]
    batch = micro_batch(0, 0) | {"images": {32: torch.randn(3, 3, 32, 32)}}
    outcome = Stepper(large, models).step(itertools.repeat(batch), 1e-3)
    return {"ranks": engine.ranks(), "positions": positions, "taken": outcome.taken}
