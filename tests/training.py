"""A tiny recipe, a tiny data set, and runs of it in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """
name = "tiny"

[model.backbone]
vocab_size = 320
hidden_size = 32
layers = 2
heads = 4
q_lora_rank = 16
kv_lora_rank = 8
qk_nope_head_dim = 4
qk_rope_head_dim = 4
v_head_dim = 8
ffn_hidden_size = 64
init_std = 0.1
embedding_init_std = 0.1
residual_init_std = 0.05

[model.moe]
experts = 4
zero_experts = 2
top_k = 2
expert_hidden_size = 16
routed_scaling_factor = 2.0
active_experts = 1.0
bias_rate = 0.02
bias_rate_min = 0.01
bias_integral_gain = 0.2
bias_derivative_gain = 0.5
balance_coefficient = 0.01
balance_groups = 2

[[model.encoders]]
name = "vit"
type = "vit"
image_size = 16
patch_size = 4
width = 16
layers = 1
heads = 2

[[model.encoders]]
name = "convnet"
type = "convnet"
image_size = 16
widths = [8, 8, 16]

[model.connector]
grid = 2
width = 16
heads = 2

[data]
mixture = "{mixture}"
root = "{root}"
sequence_length = 96
images_per_pack = 6

[train]
steps = 10
global_batch = 4
micro_batch = 2
log_every = 2

[optimizer]
lr = 5e-3
min_lr = 5e-4
warmup_steps = 2
eps = 1e-5

[checkpoint]
every = 4
"""


def write_recipe(root: Path, mixture: str) -> Path:
    path = root / "tiny.toml"
    path.write_text(RECIPE.replace("{mixture}", mixture).replace("{root}", str(root)))
    return path


def environment(**extra: str) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_BIN": sys.executable, "MMOE_RESTARTS": "0"}
    variables = os.environ | ours | extra
    return {name: value for name, value in variables.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def command(recipe: Path, out: Path, *options: str, ranks: int = 1) -> list[str]:
    launch = [str(ROOT / "launch" / "torchrun.sh"), str(ranks)] if ranks > 1 else [sys.executable, "-m", "mmoe"]
    return [*launch, "train", str(recipe), "--out", str(out), *options]


def run(recipe: Path, out: Path, *options: str, ranks: int = 1, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, out, *options, ranks=ranks),
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=300,
    )


def curve(out: Path) -> list[dict]:
    """The run's metrics without the fields that hold wall time."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def last(out: Path) -> tuple[Any, dict[str, Any]]:
    """The recipe and all weights of the last checkpoint of a run, or of a stage of one."""
    from mmoe.checkpoint.load import state_dict

    recipe, found, _ = state_dict(out / "checkpoints" / (out / "checkpoints/latest").read_text().strip())
    return recipe, dict(found)


def save_state(folder: Path, stepper: Any) -> None:
    """The state of a ``Stepper`` of all ranks, into the empty ``folder``."""
    from mmoe.parallel import state

    write = state.Write(folder, state.sharded(stepper.wrapped, stepper.optimizer))
    write.run()
    write.finish()
