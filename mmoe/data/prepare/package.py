"""Fetch the stamps' Debian package, check it and unpack what is needed, without root."""

import hashlib
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from mmoe.errors import UserError

WANTED = (".png", ".txt", "/copyright")


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mmoe``, or ``~/.cache/mmoe``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmoe"


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_stamps(card: dict[str, Any], cache: Path | None = None) -> Path:
    """Folder of the unpacked stamps; downloads and unpacks them on the first call, once per checksum.

    Args:
        card: the source card; reads its ``[package]``.
        cache: where to keep them, by default :func:`cache_folder`.

    Raises:
        UserError: no apt, no network, or a package that is not the one of the card.
    """
    package = card["package"]
    cache = cache or cache_folder()
    target = cache / f"{package['name']}-{package['sha256'][:12]}"
    if not target.is_dir():
        deb = cache / f"{package['name']}_{package['version']}.deb"
        cache.mkdir(parents=True, exist_ok=True)
        if not deb.is_file():
            _download(package, deb)
        found = sha256(deb)
        if found != package["sha256"]:
            deb.unlink()
            raise UserError(
                f"checksum of {package['name']} is {found[:12]}…, expected {package['sha256'][:12]}…",
                str(deb),
                f"the file is deleted; put version {package['version']} of Debian's package there",
            )
        _unpack(deb, target)
        deb.unlink()
    return target / package["folder"]


def _download(package: dict[str, Any], deb: Path) -> None:
    """``apt-get download`` to ``deb``; with own package lists if the machine's know nothing of the package."""
    offline = f"copy {package['name']} {package['version']} (a .deb, {package['sha256'][:12]}…) to {deb}"
    apt = shutil.which("apt-get")
    if apt is None:
        raise UserError("the stamps come as a Debian package, and there is no apt-get", "", offline)
    work = deb.with_suffix(".download")
    lists = work / "lists" / "partial"
    archives = work / "archives" / "partial"
    shutil.rmtree(work, ignore_errors=True)
    lists.mkdir(parents=True)
    archives.mkdir(parents=True)
    own = [f"-oDir::State::Lists={lists.parent}", f"-oDir::Cache={work}", "-oDebug::NoLocking=1"]
    # The pinned version first; any other version fails on its checksum with a message that says so.
    wanted = f"{package['name']}={package['version']}"
    attempts: list[list[list[str]]] = [
        [["download", wanted]],
        [[*own, "update"], [*own, "download", wanted]],
        [[*own, "download", package["name"]]],
    ]
    error = ""
    for commands in attempts:
        for arguments in commands:
            done = subprocess.run([apt, "-q", *arguments], cwd=work, capture_output=True, text=True, check=False)
            error = next((line for line in done.stderr.splitlines() if line.startswith(("E:", "W: Failed"))), error)
        found = sorted(work.glob("*.deb"))
        if found:
            found[0].replace(deb)
            shutil.rmtree(work)
            return
    shutil.rmtree(work)
    raise UserError(f"cannot download {package['name']}", error, f"check the network, or {offline}")


def _unpack(deb: Path, target: Path) -> None:
    """Unpack pictures, captions and the copyright notice; the package's sounds are three quarters of it."""
    dpkg = shutil.which("dpkg-deb")
    if dpkg is None:
        raise UserError("cannot unpack a .deb without dpkg-deb", str(deb), "install dpkg")
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with subprocess.Popen([dpkg, "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name.endswith(WANTED) else None
                if content is not None:
                    path = partial / member.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
    if process.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError("dpkg-deb failed", str(deb), "delete the file and try again")
    partial.rename(target)
