"""Python processes that can load a sanitized library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_python(variant: str, script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs ``script`` with the sanitizer of ``variant`` loaded before everything else.

    A report of AddressSanitizer or ThreadSanitizer goes to stderr and makes the exit status not 0.
    """
    command = [sys.executable, "-c", script, *arguments]
    settings = dict(os.environ)
    if variant in ("asan", "tsan"):
        settings["LD_PRELOAD"] = runtime(f"lib{variant}.so")
        # CPython frees little at exit, and torch's own threads are nobody's subject here.
        settings["ASAN_OPTIONS"] = "detect_leaks=0"
        settings["TSAN_OPTIONS"] = "report_thread_leaks=0"
        # GCC 12's ThreadSanitizer does not start where the kernel places mappings at random.
        command = ["setarch", "-R", *command]
    return subprocess.run(command, env=settings | environment, capture_output=True, text=True, timeout=300)


def runtime(name: str) -> str:
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"this g++ has no {name}")
    return path
