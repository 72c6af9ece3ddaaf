"""launch/slurm/train.sbatch on a real cluster of two nodes: requeued at the time limit, and after a node is lost."""

import time
from pathlib import Path

import cluster
import pytest
import runs
from cluster import Cluster

SCRIPT = runs.LAUNCH / "slurm" / "train.sbatch"
NODES = ["--nodes=2", "--ntasks-per-node=2"]


def submit(nodes: Cluster, recipe: Path, out: Path, *options: str, steps: int = runs.STEPS, **extra: str) -> str:
    out.mkdir()
    where = [f"--output={out.parent}/log", f"--chdir={out.parent}"]
    variables = runs.environment(MMOE_HOME=str(runs.LAUNCH.parent), **extra)
    arguments = (str(recipe), "--out", str(out), *runs.FOUR, f"train.steps={steps}")
    return nodes.submit(SCRIPT, *arguments, options=[*where, *options], environment=variables)


def test_a_job_saves_before_its_time_limit_is_requeued_and_goes_on(
    two_nodes: Cluster, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    """The signal is the one that --signal asks for, sent by hand."""
    job = submit(two_nodes, recipe, tmp_path / "run", *NODES)
    runs.wait_for_checkpoint(tmp_path / "run")
    two_nodes.ask("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(lambda: two_nodes.state(job).endswith(" 1"), "requeue")
    log = tmp_path / "log"
    assert two_nodes.wait_for_end(job) == "COMPLETED 1", log.read_text()
    printed = log.read_text()
    assert printed.count("saved; go on with --resume") == 1
    assert printed.count(f"mmoe: job {job}: saved before the time limit: requeued") == 1
    assert runs.difference(tmp_path / "run", whole) == 0


@pytest.mark.slow
def test_the_time_limit_itself(two_nodes: Cluster, recipe: Path, tmp_path: Path) -> None:
    job = submit(two_nodes, recipe, tmp_path / "run", "--time=1", "--signal=B:USR1@20", *NODES, steps=100000)
    cluster.wait_for(lambda: two_nodes.state(job).endswith(" 1"), "requeue", 180)
    two_nodes.ask("scancel", job)
    assert "saved before the time limit: requeued" in (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


@pytest.mark.slow
def test_a_job_goes_on_without_a_lost_node(two_nodes: Cluster, recipe: Path, whole: Path, tmp_path: Path) -> None:
    job = submit(two_nodes, recipe, tmp_path / "run", "--nodes=1-2", "--exclusive", MMOE_RANKS="2", MMOE_BACKOFF="5")
    runs.wait_for_checkpoint(tmp_path / "run")
    two_nodes.kill_node("n2")
    try:
        cluster.wait_for(lambda: not two_nodes.state(job).endswith(" 0"), "requeue", 120)
        end = two_nodes.wait_for_end(job)
    finally:
        two_nodes.start_node("n2")
    assert end.startswith("COMPLETED"), (tmp_path / "log").read_text()
    assert "NumNodes=1 " in two_nodes.ask("scontrol", "show", "job", job)
    assert runs.difference(tmp_path / "run", whole) <= runs.OTHER_ORDER


@pytest.mark.slow
def test_a_cancelled_job_saves_and_does_not_come_back(two_nodes: Cluster, recipe: Path, tmp_path: Path) -> None:
    job = submit(two_nodes, recipe, tmp_path / "run", *NODES)
    runs.wait_for_checkpoint(tmp_path / "run")
    two_nodes.ask("scancel", job)
    assert two_nodes.wait_for_end(job) == "CANCELLED 0"
    cluster.wait_for(lambda: "saved; go on with --resume" in (tmp_path / "log").read_text(), "word of the ranks")
    time.sleep(6)  # as long as a requeued job waits
    assert two_nodes.state(job) == "CANCELLED 0"


@pytest.mark.slow
def test_what_the_user_must_mend_ends_the_job(two_nodes: Cluster, recipe: Path, tmp_path: Path) -> None:
    job = submit(two_nodes, recipe.parent / "missing.toml", tmp_path / "run", *NODES)
    assert two_nodes.wait_for_end(job) == "FAILED 0"
    assert "ExitCode=2:0" in two_nodes.ask("scontrol", "show", "job", job)
    assert "restarting" not in (tmp_path / "log").read_text()
