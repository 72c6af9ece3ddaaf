"""What the compiler made of each kernel: its resources, its machine code, and the occupancy that follows."""

import importlib.metadata
import os
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

RESOURCES = re.compile(r"Function (?P<symbol>\w+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
# Of a multiprocessor, by architecture: bytes of shared memory. Registers, warps and blocks are the same on all three.
SHARED = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024, "sm_100": 228 * 1024}
REGISTERS, WARPS, BLOCKS = 65536, 64, 32


class Kernel(NamedTuple):
    threads: int
    """Of a block, by __launch_bounds__."""
    registers: int
    shared: int
    """Static shared memory, bytes."""
    stack: int
    local: int
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        return sum(number for name, number in self.instructions.items() if re.match(pattern, name))

    def accesses(self, kind: str) -> dict[int, int]:
        """How often loads ("LD") or stores ("ST") of global memory stand in the kernel, by bits, widest first."""
        found: Counter[int] = Counter()
        for name, number in self.instructions.items():
            # LD and ST without G: of an address that may be in shared memory too.
            if match := re.fullmatch(rf"{kind}G?((?:\.\w+)*)", name):
                bits = re.search(r"\.[US]?(8|16|64|128)\b", match[1])
                found[int(bits[1]) if bits else 32] += number
        return dict(sorted(found.items(), reverse=True))

    def blocks(self, arch: str, dynamic: int) -> int:
        """Blocks that a multiprocessor holds at a time."""
        warps = -(-self.threads // 32)
        # Registers are dealt out by 256 to a warp, shared memory by 128 bytes and 1 KiB for the system to a block.
        by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256) // warps
        by_shared = SHARED[arch] // (-(-(self.shared + dynamic + 1024) // 128) * 128)
        return min(by_registers, by_shared, WARPS // warps, BLOCKS)

    def occupancy(self, arch: str, dynamic: int) -> float:
        """Share of the multiprocessor's warps that may be resident."""
        return self.blocks(arch, dynamic) * -(-self.threads // 32) / WARPS


def kernels(library: Path) -> dict[tuple[str, str], Kernel]:
    """Every kernel of the library by (name, architecture)."""
    code = machine_code(library)
    threads = block_sizes(library)
    names = demangled(set(threads))
    found = {}
    for part in cuobjdump("-res-usage", library).split("arch = ")[1:]:
        arch = part.split(maxsplit=1)[0]
        for symbol, registers, stack, shared, local in RESOURCES.findall(part):
            sizes = int(registers), int(shared), int(stack), int(local)
            found[names[symbol], arch] = Kernel(threads[symbol], *sizes, code[symbol, arch])
    return found


def machine_code(library: Path) -> dict[tuple[str, str], Counter[str]]:
    """How often each instruction stands in a kernel, by (symbol, architecture)."""
    code: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    arch = symbol = ""
    for line in cuobjdump("-sass", library).splitlines():
        if line.startswith("\tcode for "):
            arch = line.split()[-1]
        elif "Function : " in line:
            symbol = line.split()[-1]
        elif found := INSTRUCTION.match(line):
            code[symbol, arch][found[1]] += 1
    return code


def block_sizes(library: Path) -> dict[str, int]:
    ptx = cuobjdump("-ptx", library)
    return {symbol: int(size) for symbol, size in re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx, re.DOTALL)}


def cuobjdump(*arguments: str | Path) -> str:
    try:
        found = importlib.metadata.distribution("nvidia-cuda-cuobjdump").locate_file("nvidia/cu13/bin/cuobjdump")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nvidia-cuda-cuobjdump is not installed: it has no build for this platform")
    # It calls nvdisasm, which lies beside it.
    path = f"{Path(str(found)).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [str(found), *arguments], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    ).stdout


def demangled(symbols: set[str]) -> dict[str, str]:
    """{symbol: operator::kernel<types>}, without the result's type, the project's namespace and the parameters."""
    ordered = sorted(symbols)
    said = subprocess.run(["c++filt"], input="\n".join(ordered), capture_output=True, text=True, check=True).stdout
    names = {}
    for symbol, name in zip(ordered, said.splitlines(), strict=True):
        depth = 0
        for end, letter in enumerate(name):
            depth += {"<": 1, ">": -1}.get(letter, 0)
            if letter == "(" and depth == 0:
                name = name[:end]
                break
        names[symbol] = name.removeprefix("void ").removeprefix("mmoe::")
    return names
