"""The grid of process groups over a process's life."""

import subprocess
import sys

LIFE = """
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from mmoe.parallel import engine
from mmoe.recipe.schema import Parallel

def groups():
    return set(distributed_c10d._world.pg_map)

engine.start(Parallel(), 0, alone=True)
first, made = engine.expert_group(), groups()
engine.start(Parallel(overlap_moe=False, recompute="full"), 1, alone=True)
print("kept", engine.expert_group() is first, groups() == made)
# A grid of other sizes: one rank has room for no other layout, so the record of the sizes is changed.
engine._grid.sizes = {}
engine.start(Parallel(), 2, alone=True)
print("ended", first not in groups(), len(groups()) == len(made))
value = engine.sum_over_world(torch.ones(1)).item()
print("works", value, dist.get_world_size(engine.expert_group()))
"""


def test_a_grid_lives_until_its_sizes_change() -> None:
    done = subprocess.run([sys.executable, "-c", LIFE], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["kept True True", "ended True True", "works 1.0 1"], done.stderr
