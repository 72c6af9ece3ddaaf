"""Run by test_skips.py on two ranks: one rank's loss is not finite, or one rank's micro-batch has no image."""

import json
import sys

import torch

from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.recipe import load_recipe
from mmoe.train.step import Stepper


def batch(rank: int, step: int, images: int) -> dict:
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(4, 64, (1, 24), generator=generator)
    for image in range(images):
        tokens[0, 1 + 5 * image : 5 + 5 * image] = 3
    return {
        "tokens": tokens,
        "labels": torch.randint(4, 64, (1, 24), generator=generator),
        "loss_mask": torch.ones(1, 24),
        "position": torch.arange(24).view(1, 24),
        "document": torch.ones(1, 24, dtype=torch.int32),
        "branch": torch.zeros(1, 24, dtype=torch.int32),
        "images": {16: torch.rand(images, 3, 16, 16, generator=generator)},
        "original_sizes": torch.full((images, 2), 16),
        "samples": [["a"]],
        "skipped": [],
    }


def main() -> None:
    recipe = load_recipe(sys.argv[1], ["train.global_batch=2", "train.micro_batch=1", "parallel.expert=2"])
    here = engine.start(recipe.parallel, 0)
    stepper = Stepper(recipe, [build(recipe)])
    batches = [batch(here.rank, step, images=2) for step in range(3)]
    if here.rank == 1:
        batches[1]["images"][16][0, 0, 0, 0] = float("nan")
        batches[2] = batch(here.rank, 2, images=0)
    seen = []
    (model,) = stepper.models
    for data in batches:
        before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
        outcome = stepper.step(iter([data]), 1e-2)
        after = model.state_dict()
        changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
        seen.append({"taken": outcome.taken, "changed": len(changed), "loss": repr(outcome.loss)})
    everyone: list = [None, None]
    torch.distributed.all_gather_object(everyone, seen)
    if here.first:
        print(json.dumps(everyone))


if __name__ == "__main__":
    main()
