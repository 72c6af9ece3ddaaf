"""No tokens for an expert, a rank or anybody, and no images: two expert-parallel ranks step as one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import training

TOLERANCE = 2e-6
SCRIPT = Path(__file__).with_name("idle_experts.py")


def run(root: Path, *launch: str) -> dict[str, dict]:
    recipe = training.write_recipe(root, "none")
    command = [sys.executable, *launch, str(SCRIPT), str(recipe)]
    done = subprocess.run(command, env=training.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "watchdog" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_idle_experts_ranks_and_encoders(tmp_path: Path) -> None:
    single = run(tmp_path)
    pair = run(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert single.keys() == pair.keys()
    for name, expected in single.items():
        got = pair[name]
        assert got["taken"], name
        assert got["counts"] == expected["counts"], name
        assert got["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE), name
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-5), name
    assert sum(pair["every token chooses zero experts alone"]["counts"][:4]) == 0
    assert pair["an expert gets nothing"]["counts"][3] == 0
    assert pair["a rank's experts get nothing"]["counts"][2:4] == [0, 0]
    assert min(pair["all as usual"]["counts"]) > 0
