"""What happens on one rank is decided by all: a loss that is not finite, a micro-batch without images."""

import json
import subprocess
import sys
from pathlib import Path

import training


def test_all_ranks_skip_together_and_go_on(tmp_path: Path) -> None:
    recipe = training.write_recipe(tmp_path, "none")
    script = Path(__file__).with_name("one_bad_rank.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, recipe],
        env=training.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ranks = json.loads(done.stdout.splitlines()[-1])
    for good, bad, without_images in ranks:
        assert good["taken"]
        assert good["changed"] > 20
        assert not bad["taken"]
        assert bad["changed"] == 0
        assert bad["loss"] == "nan"
        assert without_images["taken"]
        assert without_images["changed"] > 20
    assert ranks[0][0]["loss"] == ranks[1][0]["loss"]
