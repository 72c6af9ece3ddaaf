"""The pool of keep_pages.c under every large tensor of a run, ours and the peers' alike."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from mmoe.errors import UserError

SOURCE = Path(__file__).with_name("keep_pages.c")
LIBRARY = SOURCE.parents[1] / "build" / "benchmarks" / "keep_pages.so"


def preload() -> None:
    """Start this very command again with the pool in front of glibc's allocator, unless it is there already.

    Raises:
        UserError: it does not compile.
    """
    if str(LIBRARY) in _preloaded():
        return
    build()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | _environment([LIBRARY, *_preloaded()]))


def build() -> None:
    """Compile keep_pages.c, where it changed."""
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CC", "gcc"), "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", LIBRARY, SOURCE]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        raise UserError(
            f"keep_pages.c was not built: {reason}", "", "install gcc, or use --allocator system"
        ) from error


def release() -> None:
    """Give what the pool holds back to the system; does nothing without the pool."""
    pool = getattr(ctypes.CDLL(None), "mmoe_release_pages", None)
    if pool:
        pool()


def system_environment() -> dict[str, str]:
    """The environment of a process that shall run without the pool."""
    return os.environ | _environment([path for path in _preloaded() if path != str(LIBRARY)])


def _preloaded() -> list[str]:
    return os.environ.get("LD_PRELOAD", "").split()


def _environment(libraries: list) -> dict[str, str]:
    return {"LD_PRELOAD": " ".join(map(str, libraries))}
