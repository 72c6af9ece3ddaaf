"""Run by test_idle_experts.py on one or two ranks: steps in which tokens, experts or a rank have nothing to do.

A step is two packs, each a micro-batch of its own: two of one rank, or one of each. The selection bias is set for each
micro-batch, so that it decides the routing alike on one rank and on two.
"""

import json
import sys
from collections.abc import Iterator

from one_bad_rank import batch

from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.recipe import load_recipe
from mmoe.train import controller
from mmoe.train.step import Stepper

# Experts 0 to 3 are FFN experts, two on each of two ranks; 4 and 5 are zero experts; top_k is 2.
AWAY = -100.0
ALL_ZERO, NOT_3, NOT_SECOND_RANK, PLAIN = [0, 1, 2, 3], [3], [2, 3], []
STEPS: dict[str, tuple[tuple[list[int], int], tuple[list[int], int]]] = {
    # Of each pack: the experts that none of its tokens chooses, and its images.
    "all as usual": ((PLAIN, 2), (PLAIN, 2)),
    "one pack chooses zero experts alone": ((PLAIN, 2), (ALL_ZERO, 2)),
    "every token chooses zero experts alone": ((ALL_ZERO, 2), (ALL_ZERO, 2)),
    "an expert gets nothing": ((NOT_3, 2), (NOT_3, 2)),
    "a rank's experts get nothing": ((NOT_SECOND_RANK, 2), (NOT_SECOND_RANK, 2)),
    "a pack without images": ((PLAIN, 2), (PLAIN, 0)),
    "nothing of any kind": ((PLAIN, 2), (ALL_ZERO, 0)),
}


def packs(stepper: Stepper, step: int, plan: tuple, mine: list[int]) -> Iterator[dict]:
    for pack in mine:
        away, images = plan[pack]
        for router in controller.routers(stepper.models).values():
            bias = router.e_score_correction_bias
            bias.zero_()
            bias[away] = AWAY
        yield batch(pack, step, images)


def main() -> None:
    ranks = engine.announced()[1]
    recipe = load_recipe(
        sys.argv[1],
        ["train.global_batch=2", "train.micro_batch=1", f"parallel.expert={ranks}", "data.sequence_length=24"],
    )
    here = engine.start(recipe.parallel, 0)
    stepper = Stepper(recipe, [build(recipe)])
    mine = [here.rank] if ranks == 2 else [0, 1]
    seen = {}
    for step, (name, plan) in enumerate(STEPS.items()):
        outcome = stepper.step(packs(stepper, step, plan, mine), 1e-3)
        counts = outcome.tallies[:, :6].sum(0).tolist()
        seen[name] = {"loss": outcome.loss, "grad_norm": outcome.grad_norm, "counts": counts, "taken": outcome.taken}
    if here.first:
        print(json.dumps(seen))


if __name__ == "__main__":
    main()
