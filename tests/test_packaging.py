"""What is shipped: the source distribution and the wheel, what they require, and the wheel in a clean environment."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LANES = ["3.11", "3.12"]
# What a module is installed by, where the names differ.
DISTRIBUTION = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "huggingface_hub": "huggingface-hub",
    "megatron": "megatron-core",
    "nvidia": "nvidia-dali-cuda130",
}
NOT_SOURCES = (".git", ".venv*", "build", "dist", "runs", "data-cache", "*.so", "*.egg-info", "__pycache__", ".*_cache")


@pytest.fixture(scope="module")
def project(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def distributions(root, tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    # In a copy, because setuptools leaves build/ and *.egg-info beside setup.py.
    shutil.copytree(root, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "out", folder / "source"]
    run = subprocess.run(command, env=os.environ | {"MMOE_BUILD_CUDA": "0"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (sdist,) = (folder / "out").glob("*.tar.gz")
    (wheel,) = (folder / "out").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def clean_environment(distributions, tmp_path_factory) -> Path:
    """The Python of a new environment that holds the wheel and sees the libraries of the running one."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", distributions[1]]
    subprocess.run(install, check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # A .pth file adds the folder without running the .pth files in it, so an editable mmoe there stays out of sight.
    (site / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_wheel_works_in_a_clean_environment(root, clean_environment, tmp_path):
    script = """
import json, torch, mmoe, mmoe._host
from mmoe.data.shipped import shipped
from mmoe.ops.permute_index import permute_index
from mmoe.recipe import list_recipes, load_recipe
print(json.dumps({
    "file": mmoe.__file__,
    "rows": torch.ops.mmoe.permute_index(torch.tensor([[2, 0], [1, 3]]), 3)[1].tolist(),
    "recipes": sorted(load_recipe(name).name for name in list_recipes()),
    "card": str(shipped("sources", "stamps")),
}))
"""
    result = json.loads(run([clean_environment, "-W", "error::RuntimeWarning", "-c", script], tmp_path))
    environment = str(clean_environment.parents[1])
    assert result["file"].startswith(environment)
    assert result["card"].startswith(environment)
    assert result["rows"] == [1, 2, 0]
    assert result["recipes"] == sorted(path.stem for path in (root / "mmoe/recipe/recipes").glob("*.toml"))
    assert result["recipes"]


def test_console_script(clean_environment, tmp_path):
    assert run([clean_environment.with_name("mmoe"), "--help"], tmp_path).startswith("usage: mmoe")


def test_every_module_and_card_is_in_the_wheel(root, distributions):
    names = set(zipfile.ZipFile(distributions[1]).namelist())
    modules = {str(path.relative_to(root)) for path in (root / "mmoe").rglob("*.py")}
    cards = {f"mmoe/data/shipped/{path.relative_to(root / 'data')}" for path in root.glob("data/*/*.toml")}
    assert cards
    assert modules | cards <= names
    licences = {name.rsplit("/", 1)[1] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_source_distribution_can_be_built(root, distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(root)) for path in (root / "csrc").rglob("*") if path.is_file()}
    assert sources | {"setup.py", "pyproject.toml", "constraints.txt", "NOTICE"} <= names


@pytest.mark.parametrize("folder", ["mmoe", "benchmarks", "tests"])
def test_every_import_is_a_declared_dependency(root, project, folder):
    # mmoe asks for mpi4py under mpirun alone, for simplejpeg where a recipe names it, for pyarrow where CV-Bench's
    # files are parquet, and says how to get them.
    optional = {"mmoe": ["mpi", "jpeg", "cv-bench"], "benchmarks": ["dev"], "tests": ["dev"]}
    extras = [project["optional-dependencies"][extra] for extra in optional[folder]]
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    sources = list((root / folder).rglob("*.py"))
    modules: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.split(".")[0])
    ours = {"mmoe", "benchmarks"}
    if folder == "tests":
        # Helpers are found in their own folder, or through it.
        ours |= {source.stem for source in sources} | {source.parent.name for source in sources}
    needed = {DISTRIBUTION.get(module, module) for module in modules - sys.stdlib_module_names - ours}
    assert needed <= {Requirement(text).name for text in texts}


@pytest.mark.parametrize("python", LANES)
def test_every_requirement_is_pinned_within_its_range(root, project, python):
    pins = {}
    for line in (root / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert pin.name not in pins, f"{pin.name} is pinned twice for Python {python}"
                pins[pin.name] = str(pin.specifier).removeprefix("==")
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_transformer_engine_is_never_bare(project):
    (requirement,) = map(Requirement, project["optional-dependencies"]["gpu"])
    assert requirement.name == "transformer-engine"
    assert requirement.extras == {"pytorch", "core_cu13"}


def run(command: list, cwd: Path) -> str:
    """Standard output of a command that sees nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
