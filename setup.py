"""Builds the two compiled parts of mmoe with ninja, and puts the data cards into the wheel.

`mmoe/_C.so`      the operators (csrc/bindings.cpp, csrc/*/*_cpu.cpp, csrc/*/*_cuda.cu) on torch's stable ABI
`mmoe/_host.*.so` host-side helpers without tensors (csrc/host/*.cpp) on pybind11

MMOE_BUILD_CUDA=auto|0|1   compile the .cu files: where nvcc is found (default), never, or fail without nvcc
MMOE_CUDA_ARCHS            comma-separated, default 80,90a,100; the first is kept as PTX for every newer GPU
CUDA_HOME                  where nvcc is looked for before PATH
MAX_JOBS                   compilers at a time, default ninja's
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TORCH = Path(str(torch.__file__)).parent
OPERATORS, HOST = "mmoe._C", "mmoe._host"
CXX = os.environ.get("CXX", "g++")
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden"]
# Only what torch 2.13 promises, so that a library built here loads in every later torch.
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020d000000000000", f"-I{ROOT / 'csrc'}", "-isystem", str(TORCH / "include")]


def find_nvcc() -> str | None:
    """The CUDA compiler this build uses, by MMOE_BUILD_CUDA. A GPU is never asked for: builders have none."""
    wanted = os.environ.get("MMOE_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"MMOE_BUILD_CUDA={wanted}: must be auto, 0 or 1")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        place = f"{home}/bin" if home else "PATH"
        raise SystemExit(f"MMOE_BUILD_CUDA=1, but there is no nvcc in {place}: set CUDA_HOME")
    return nvcc


def nvcc_flags() -> list[str]:
    archs = os.environ.get("MMOE_CUDA_ARCHS", "80,90a,100").split(",")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    ptx = f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"
    # -Xptxas=-v prints registers and spills of every kernel; tests/csrc reads them.
    return ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-Wall,-fvisibility=hidden", "-Xptxas=-v", "-lineinfo", *codes, ptx]


def escape(word: str | Path) -> str:
    """A word of a ninja build line."""
    return str(word).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build_file(libraries: dict[str, tuple[list[str], Path]]) -> str:
    """build.ninja for {extension: (its sources, the library to write)}; objects lie beside it."""
    nvcc = find_nvcc()
    host_flags = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    torch_links = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    lines = [
        # -MD, not -MMD: another torch under the same path must rebuild.
        "rule compile\n command = $compiler $flags -MD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
        # nvcc links CUDA's static runtime, so the library loads where there is neither a driver nor a toolkit.
        "rule link\n command = $compiler -shared $in $links -o $out",
    ]
    for name, (sources, library) in libraries.items():
        flags, links = (TORCH_FLAGS, torch_links) if name == OPERATORS else (host_flags, [])
        objects = []
        for source in sources:
            cuda = source.endswith(".cu")
            objects.append(f"{Path(source).relative_to('csrc')}.o")
            lines.append(
                f"build {escape(objects[-1])}: compile {escape(ROOT / source)}\n"
                f" compiler = {nvcc if cuda else CXX}\n"
                f" flags = {shlex.join((nvcc_flags() if cuda else CXX_FLAGS) + flags).replace('$', '$$')}"
            )
        linker = nvcc if any(source.endswith(".cu") for source in sources) else CXX
        lines.append(
            f"build {escape(library)}: link {' '.join(map(escape, objects))}\n"
            f" compiler = {linker}\n links = {shlex.join(links).replace('$', '$$')}"
        )
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Every extension through one ninja file."""

    def get_ext_filename(self, fullname: str) -> str:
        name = super().get_ext_filename(fullname)
        # The operators do not use Python's ABI: one file for every Python, found under one name.
        if fullname.split(".")[-1] == OPERATORS.split(".")[-1]:
            return name.removesuffix(sysconfig.get_config_var("EXT_SUFFIX")) + ".so"
        return name

    def build_extensions(self) -> None:
        # An editable install names a temporary folder; objects kept here make the next one incremental.
        folder = Path("build", f"ninja-{sys.implementation.cache_tag}") if self.editable_mode else Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        libraries = {}
        for extension in self.extensions:
            library = Path(self.get_ext_fullpath(extension.name)).resolve()
            library.parent.mkdir(parents=True, exist_ok=True)
            libraries[extension.name] = (extension.sources, library)
        (folder / "build.ninja").write_text(build_file(libraries))
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
        subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", folder, *jobs], check=True)


class BuildWithCards(build_py):
    """Copies the cards of data/ to where mmoe.data.shipped looks in an installed package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for card in ROOT.glob("data/*/*.toml"):
            target = Path(self.build_lib, "mmoe", "data", "shipped", card.parent.name, card.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(card, target)


def sources(*patterns: str) -> list[str]:
    return sorted(str(source.relative_to(ROOT)) for pattern in patterns for source in ROOT.glob(pattern))


operators = sources("csrc/bindings.cpp", "csrc/*/*_cpu.cpp", *(["csrc/*/*_cuda.cu"] if find_nvcc() else []))
setup(
    ext_modules=[Extension(OPERATORS, operators), Extension(HOST, sources("csrc/host/*.cpp"))],
    cmdclass={"build_ext": NinjaBuild, "build_py": BuildWithCards},
)
