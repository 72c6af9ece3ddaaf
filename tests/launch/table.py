"""python tests/launch/table.py   the same ranks by every launcher that is here, as the table of launch/README.md."""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), *(str(TESTS / part) for part in ("", "data", "launch"))]

import cluster  # noqa: E402 - found through the line above
import hosts  # noqa: E402
import runs  # noqa: E402
import sets  # noqa: E402
import test_curves  # noqa: E402
import test_slurm  # noqa: E402
import training  # noqa: E402


def one_host(launcher: str, recipe: Path, out: Path, **variables: str) -> None:
    runs.finish(runs.start(runs.command(launcher, 4, recipe, out, *runs.FOUR), runs.environment(**variables)))


def mpirun_on_one_host(kind: str, recipe: Path, out: Path) -> None:
    one_host("mpirun.sh", recipe, out, **runs.mpi(kind))


def torchrun_on_hosts(recipe: Path, out: Path) -> None:
    need(hosts.impossible())
    with hosts.two_hosts() as both:
        words = runs.command("torchrun.sh", 2, recipe, out, *runs.FOUR)
        settings = [runs.environment(**test_curves.meeting(both, rank, "2")) for rank in (0, 1)]
        started = [both.start(*pair) for pair in zip(both.addresses, [words] * 2, settings, strict=True)]
        for process in started:
            runs.finish(process)


def mpirun_on_hosts(kind: str, recipe: Path, out: Path) -> None:
    variables = runs.mpi(kind)
    need(hosts.impossible())
    with hosts.two_hosts() as both:
        words = runs.command("mpirun.sh", 2, recipe, out, *runs.FOUR)
        settings = runs.environment(**variables, **test_curves.mpi_hosts(both))
        runs.finish(both.start(both.addresses[0], words, settings))


def slurm(recipe: Path, out: Path) -> None:
    need(cluster.impossible())
    folder = out.parent / "slurm-daemons"
    folder.mkdir()
    with cluster.two_nodes(folder) as nodes:
        job = test_slurm.submit(nodes, recipe, out, *test_slurm.NODES)
        assert nodes.wait_for_end(job) == "COMPLETED 0", (out.parent / "log").read_text()


def need(reason: str) -> None:
    if reason:
        raise LookupError(reason)


def one_process(recipe: Path, out: Path) -> None:
    done = training.run(recipe, out, *runs.ONE)
    assert done.returncode == 0, done.stderr


NAMESPACES = "2, network namespaces"
ROWS: list[tuple[str, int, str, Callable[[Path, Path], None]]] = [
    ("torchrun.sh", 4, "1", partial(one_host, "torchrun.sh")),
    ("none", 1, "1", one_process),
    ("torchrun.sh", 4, NAMESPACES, torchrun_on_hosts),
    *((f"mpirun.sh, {kind}", 4, "1", partial(mpirun_on_one_host, kind)) for kind in runs.MPI),
    *((f"mpirun.sh, {kind}", 4, NAMESPACES, partial(mpirun_on_hosts, kind)) for kind in runs.MPI),
    ("slurm/train.sbatch", 4, "2 slurmd, one machine", slurm),
]


def main() -> None:
    print("| launcher | ranks | hosts | against torchrun.sh on one host |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sets.write_set(root, "varied", sets.varied(40))
        recipe = training.write_recipe(root, sets.write_mixture(root, varied=1.0))
        for number, (launcher, ranks, where, launch) in enumerate(ROWS):
            run = root / str(number) / "run"
            run.parent.mkdir()
            try:
                launch(recipe, run)
                apart = runs.difference(run, root / "0" / "run")
                result = "the same bits" if apart == 0 else f"losses within {apart:.1e}"
            except LookupError as error:
                result = f"not run: {error}"
            print(f"| {launcher} | {ranks} | {where} | {result} |", flush=True)


if __name__ == "__main__":
    main()
