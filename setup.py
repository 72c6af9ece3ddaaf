"""Builds the two compiled parts of mmoe with ninja, and puts the data cards into the wheel.

`mmoe/_C.so`      the operators (csrc/bindings.cpp, csrc/*/*_{cpu,simd}.cpp, csrc/*/*_cuda.cu) on torch's stable ABI
`mmoe/_host.*.so` host-side helpers without tensors (csrc/host/*.cpp) on pybind11

`python setup.py build_emulated [--variant plain|asan|tsan|counted]` compiles the CUDA implementations for the CPU, on
csrc/emulator, into build/emulated/VARIANT/mmoe_emulated.so (tests and `mmoe bench ops --emulated` do it by themselves);
with `--sources FILE,...` other CUDA sources, into a library of the first one's name.

MMOE_BUILD_CUDA=auto|0|1   compile the .cu files: where nvcc is found (default), never, or fail without nvcc
MMOE_CUDA_ARCHS            comma-separated, default 80,90a,100; the first is kept as PTX for every newer GPU
CUDA_HOME                  where nvcc is looked for before PATH
MAX_JOBS                   compilers at a time, default ninja's
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar, NamedTuple

import ninja
import pybind11
import torch
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TORCH = Path(str(torch.__file__)).parent
OPERATORS, HOST = "mmoe._C", "mmoe._host"
CXX = os.environ.get("CXX", "g++")
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden"]
# A *_simd.cpp is compiled once for each; csrc/common/simd_dispatch.h chooses at run time.
X86 = platform.machine() == "x86_64"
SIMD = {"generic": []} | (
    {
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
    }
    if X86
    else {}
)
SIMD_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


class Variant(NamedTuple):
    """A build of the emulated operators: how the kernels are compiled, what all of it defines, the library's links."""

    kernels: list[str]
    defines: list[str]
    links: list[str]


SANITIZE = {"asan": ["-fsanitize=address,undefined"], "tsan": ["-fsanitize=thread"]}
EMULATED = {
    "plain": Variant(["-O2"], ["-DMMOE_EMULATED=mmoe_emulated"], []),
    "asan": Variant(
        ["-O1", *SANITIZE["asan"], "-fno-sanitize-recover=undefined"],
        ["-DMMOE_EMULATED=mmoe_emulated", "-DMMOE_EMULATED_ASAN"],
        SANITIZE["asan"],
    ),
    "tsan": Variant(
        ["-O1", *SANITIZE["tsan"]], ["-DMMOE_EMULATED=mmoe_emulated", "-DMMOE_EMULATED_TSAN"], SANITIZE["tsan"]
    ),
    # ThreadSanitizer's calls without its runtime: csrc/emulator/counters.cpp answers them.
    "counted": Variant(["-O1", *SANITIZE["tsan"]], ["-DMMOE_EMULATED=mmoe_counted", "-DMMOE_EMULATED_COUNTED"], []),
}
# Only what torch 2.13 promises, so that a library built here loads in every later torch.
TORCH_LINKS = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
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


class Object(NamedTuple):
    """One run of a compiler: `source` of the project to the object `name` of the build folder."""

    name: str
    source: str
    compiler: str
    flags: list[str]


def objects_of(name: str, sources: list[str]) -> list[Object]:
    """What the library of the extension `name` is made of."""
    if name == HOST:
        flags = [f"-I{ROOT / 'csrc'}", "-isystem", pybind11.get_include()]
        flags += ["-isystem", sysconfig.get_path("include")]
        return [Object(f"{source}.o", source, CXX, CXX_FLAGS + flags) for source in sources]
    nvcc = find_nvcc() or ""
    made = []
    for source in sources:
        if source.endswith("_simd.cpp"):
            for isa, flags in SIMD.items():
                flags = [*CXX_FLAGS, *SIMD_FLAGS, *flags, f"-DMMOE_SIMD={isa}", *TORCH_FLAGS]
                made.append(Object(f"{source}.{isa}.o", source, CXX, flags))
        elif source.endswith(".cu"):
            made.append(Object(f"{source}.o", source, nvcc, nvcc_flags() + TORCH_FLAGS))
        else:
            made.append(Object(f"{source}.o", source, CXX, CXX_FLAGS + TORCH_FLAGS))
    return made


def emulated_objects(variant: str, instrumented: list[str], plain: list[str]) -> list[Object]:
    """The emulated build: CUDA sources compiled as C++, and the emulator itself without instrumentation."""
    kernels, defines, _ = EMULATED[variant]
    # -w: CUDA's headers and attributes are not meant for g++; nvcc and the CPU build warn about our own code.
    # -g1: line tables are what a sanitizer reports; all of -g takes half as long again to compile.
    common = ["-std=c++20", "-g1", "-fPIC", "-w", *defines, "-isystem", str(cuda_include()), *TORCH_FLAGS]
    emulator = [s for s in sources("csrc/emulator/*.cpp") if variant == "counted" or not s.endswith("/counters.cpp")]
    return [
        *(Object(f"{source}.o", source, CXX, [*common, *kernels, "-x", "c++"]) for source in instrumented),
        *(Object(f"{source}.o", source, CXX, [*common, "-O2"]) for source in [*plain, *emulator]),
    ]


def cuda_include() -> Path:
    """The folder of CUDA's headers, where the emulated build finds the types and the bf16, fp16, fp8 arithmetic."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("the emulated build needs CUDA's headers, but there is no nvcc: set CUDA_HOME")
    # nvcc itself may be a wrapper; a dry run names the toolkit it belongs to.
    said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    return Path(said.split("#$ TOP=", 1)[1].splitlines()[0]) / "include"


def build_file(libraries: dict[Path, tuple[list[Object], str, list[str]]]) -> str:
    """build.ninja for {library to write: (its objects, linker, link flags)}; objects lie beside it."""
    lines = [
        # -MD, not -MMD: another torch under the same path must rebuild.
        "rule compile\n command = $compiler $flags -MD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
        # nvcc links CUDA's static runtime, so the library loads where there is neither a driver nor a toolkit.
        "rule link\n command = $compiler -shared $in $links -o $out",
    ]
    for library, (objects, linker, links) in libraries.items():
        lines.extend(
            f"build {escape(item.name)}: compile {escape(ROOT / item.source)}\n"
            f" compiler = {item.compiler}\n"
            f" flags = {shlex.join(item.flags).replace('$', '$$')}"
            for item in objects
        )
        lines.append(
            f"build {escape(library)}: link {' '.join(escape(item.name) for item in objects)}\n"
            f" compiler = {linker}\n links = {shlex.join(links).replace('$', '$$')}"
        )
    return "\n".join(lines) + "\n"


def run_ninja(folder: Path, libraries: dict[Path, tuple[list[Object], str, list[str]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(build_file(libraries))
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
    subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", folder, *jobs], check=True)


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
        libraries = {}
        for extension in self.extensions:
            library = Path(self.get_ext_fullpath(extension.name)).resolve()
            library.parent.mkdir(parents=True, exist_ok=True)
            objects = objects_of(extension.name, extension.sources)
            cuda = next((item.compiler for item in objects if item.source.endswith(".cu")), None)
            libraries[library] = objects, cuda or CXX, TORCH_LINKS if extension.name == OPERATORS else []
        run_ninja(folder, libraries)


class BuildEmulated(Command):
    """The CUDA implementations as a CPU library, see the top of this file."""

    description = "compile the CUDA implementations for the CPU emulator"
    user_options: ClassVar[list] = [
        ("variant=", None, "plain, asan, tsan or counted (default: plain)"),
        ("sources=", None, "comma-separated CUDA sources in place of the operators'"),
    ]

    def initialize_options(self) -> None:
        self.variant = "plain"
        self.sources = None

    def finalize_options(self) -> None:
        if self.variant not in EMULATED:
            raise SystemExit(f"--variant={self.variant}: must be one of {', '.join(EMULATED)}")

    def run(self) -> None:
        folder = ROOT / "build" / "emulated" / self.variant
        if self.sources is None:
            name, instrumented, plain = "mmoe_emulated", sources("csrc/*/*_cuda.cu"), ["csrc/bindings.cpp"]
            torch_links = TORCH_LINKS
        else:
            instrumented, plain, torch_links = self.sources.split(","), [], []
            name = Path(instrumented[0]).stem
        # Without -z defs a name that the emulator lacks would show at its first use only.
        links = [*EMULATED[self.variant].links, *torch_links, "-lboost_context", "-Wl,-z,defs"]
        run_ninja(folder, {folder / f"{name}.so": (emulated_objects(self.variant, instrumented, plain), CXX, links)})


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


operators = sources(
    "csrc/bindings.cpp", "csrc/*/*_cpu.cpp", "csrc/*/*_simd.cpp", *(["csrc/*/*_cuda.cu"] if find_nvcc() else [])
)
setup(
    ext_modules=[Extension(OPERATORS, operators), Extension(HOST, sources("csrc/host/*.cpp"))],
    cmdclass={"build_ext": NinjaBuild, "build_py": BuildWithCards, "build_emulated": BuildEmulated},
)
