"""Fetch the stamps' Debian package, check it and unpack what is needed, without root."""

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from mmoe.errors import UserError

WANTED = (".png", ".txt", "/copyright")
LARGEST = 1 << 30
"""Bytes of what is unpacked, in all."""


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
        cache.mkdir(parents=True, exist_ok=True)
        # In a folder of its own: an interrupted run leaves nothing, two at a time do not meet.
        with tempfile.TemporaryDirectory(prefix=".stamps-", dir=cache) as work:
            _fetch(package, cache, Path(work), target)
    return target / package["folder"]


def _fetch(package: dict[str, Any], cache: Path, work: Path, target: Path) -> None:
    """Get the package, check it, and unpack it to ``target``."""
    # A package that the user put here, as the messages below advise, goes before a download.
    given = cache / f"{package['name']}_{package['version']}.deb"
    offline = f"copy {package['name']} {package['version']} (a .deb, {package['sha256'][:12]}…) to {given}"
    deb = given if given.is_file() else _download(package, work, offline)
    found = sha256(deb)
    if found != package["sha256"]:
        raise UserError(
            f"checksum of {deb.name} is {found[:12]}…, expected {package['sha256'][:12]}…",
            "another version of the package" if deb != given else str(given),
            offline,
        )
    _unpack(deb, work / "unpacked")
    if not target.exists():
        (work / "unpacked").rename(target)
    given.unlink(missing_ok=True)


def _download(package: dict[str, Any], work: Path, offline: str) -> Path:
    """``apt-get download``; with own package lists if the machine's know nothing of the package."""
    apt = shutil.which("apt-get")
    if apt is None:
        raise UserError("the stamps come as a Debian package, and there is no apt-get", "", offline)
    for folder in ("lists", "archives"):
        (work / folder / "partial").mkdir(parents=True)
    own = [f"-oDir::State::Lists={work / 'lists'}", f"-oDir::Cache={work}", "-oDebug::NoLocking=1"]
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
            return found[0]
    raise UserError(f"cannot download {package['name']}", error, f"check the network, or {offline}")


def _unpack(deb: Path, folder: Path) -> None:
    """Unpack pictures, captions and the copyright notice; the package's sounds are three quarters of it."""
    dpkg = shutil.which("dpkg-deb")
    if dpkg is None:
        raise UserError("cannot unpack a .deb without dpkg-deb", str(deb), "install dpkg")
    room = LARGEST
    folder.mkdir()
    with subprocess.Popen([dpkg, "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    if not member.name.endswith(WANTED) or not member.isfile() or member.issparse():
                        continue
                    room -= member.size
                    path = folder / member.name
                    if room < 0 or not Path(os.path.normpath(path)).is_relative_to(folder):
                        what = "leads out of the package" if room >= 0 else f"goes beyond {LARGEST} bytes in all"
                        raise UserError(f"{member.name!r} {what}", str(deb), "delete the package")
                    content = tar.extractfile(member)
                    assert content is not None
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
        except tarfile.TarError as error:
            raise UserError(f"no package: {error}", str(deb), "delete it, and it is fetched again") from None
    if process.returncode:
        raise UserError("dpkg-deb failed", str(deb), "see its message above; is the disk full?")
