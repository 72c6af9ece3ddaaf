"""Fetching the package: once, checked, and a clear word when it cannot be had."""

import hashlib
import io
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mmoe.data.prepare.package import cache_folder, fetch_stamps
from mmoe.errors import UserError

FOLDER = "usr/share/stamps"
FILES = {
    f"./{FOLDER}/animals/pig.png": b"picture",
    f"./{FOLDER}/animals/pig.txt": b"A pig.",
    f"./{FOLDER}/animals/pig.ogg": b"oink",
    "./usr/share/doc/stamps/copyright": b"GPL-2",
}


def package() -> bytes:
    """What `dpkg-deb --fsys-tarfile` prints; the made dpkg-deb below prints the .deb itself."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def card(content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"package": {"name": "made-stamps", "version": "1-1", "sha256": digest, "folder": FOLDER}}


def command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH but for the shell's own tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin")
    monkeypatch.setattr("mmoe.data.prepare.package.shutil.which", lambda name: found(folder / name))
    command(folder, "dpkg-deb", 'cat "$2"')
    return folder


def found(path: Path) -> str | None:
    return str(path) if path.is_file() else None


def test_pictures_and_captions_are_unpacked_once(commands: Path, tmp_path: Path) -> None:
    content, calls = package(), tmp_path / "calls"
    (tmp_path / "source.deb").write_bytes(content)
    command(commands, "apt-get", f'echo "$@" >> {calls}; cp {tmp_path}/source.deb made-stamps_1-1_all.deb')
    cache = tmp_path / "cache"
    root = fetch_stamps(card(content), cache)
    assert root.is_relative_to(cache)
    assert root.as_posix().endswith(FOLDER)
    assert (root / "animals" / "pig.txt").read_bytes() == b"A pig."
    unpacked = sorted(path.name for path in cache.rglob("*") if path.is_file())
    assert unpacked == ["copyright", "pig.png", "pig.txt"]
    assert fetch_stamps(card(content), cache) == root
    assert calls.read_text().splitlines() == ["-q download made-stamps=1-1"]


def test_package_lists_of_its_own_are_fetched_where_the_machine_has_none(commands: Path, tmp_path: Path) -> None:
    content, calls = package(), tmp_path / "calls"
    (tmp_path / "source.deb").write_bytes(content)
    case = f'case "$*" in *Lists*download*) cp {tmp_path}/source.deb a.deb;; *Lists*) ;; *) exit 100;; esac'
    command(commands, "apt-get", f'echo "$@" >> {calls}\n{case}')
    fetch_stamps(card(content), tmp_path / "cache")
    assert [line.split()[-1] for line in calls.read_text().splitlines()] == [
        "made-stamps=1-1",
        "update",
        "made-stamps=1-1",
    ]


def test_another_package_is_refused(commands: Path, tmp_path: Path) -> None:
    command(commands, "apt-get", "echo other > made-stamps_2-1_all.deb")
    with pytest.raises(UserError, match=r"checksum of made-stamps_2-1_all\.deb is .*: copy made-stamps 1-1"):
        fetch_stamps(card(package()), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_offline_says_what_to_do(commands: Path, tmp_path: Path) -> None:
    command(commands, "apt-get", 'echo "E: Could not resolve host" >&2; exit 100')
    with pytest.raises(UserError, match=r"cannot download made-stamps \(E: Could not resolve host\): check"):
        fetch_stamps(card(package()), tmp_path / "cache")


def test_without_apt_says_what_to_do(commands: Path, tmp_path: Path) -> None:
    del commands
    with pytest.raises(UserError, match=r"there is no apt-get: copy made-stamps 1-1 \(a \.deb, .*\) to .*\.deb"):
        fetch_stamps(card(package()), tmp_path / "cache")


def test_a_package_put_into_the_cache_is_used(commands: Path, tmp_path: Path) -> None:
    """What the messages above tell the user to do works without apt."""
    del commands
    content = package()
    with pytest.raises(UserError) as error:
        fetch_stamps(card(content), tmp_path / "cache")
    Path(error.value.fix.rpartition(" to ")[2]).write_bytes(content)
    assert (fetch_stamps(card(content), tmp_path / "cache") / "animals" / "pig.png").is_file()


def test_a_broken_package_leaves_nothing_behind(commands: Path, tmp_path: Path) -> None:
    content = package()
    command(commands, "apt-get", "echo")
    command(commands, "dpkg-deb", 'cat "$2"; exit 2')
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "made-stamps_1-1.deb").write_bytes(content)
    with pytest.raises(UserError, match="dpkg-deb failed"):
        fetch_stamps(card(content), cache)
    assert sorted(path.name for path in cache.iterdir()) == ["made-stamps_1-1.deb"]


def test_an_altered_package_in_the_cache_is_named_and_left_to_the_user(commands: Path, tmp_path: Path) -> None:
    given = tmp_path / "cache" / "made-stamps_1-1.deb"
    given.parent.mkdir()
    given.write_bytes(package()[:-1])
    with pytest.raises(UserError, match=r"checksum of made-stamps_1-1\.deb") as error:
        fetch_stamps(card(package()), given.parent)
    assert error.value.where == str(given)
    assert [path.name for path in given.parent.iterdir()] == [given.name]


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mmoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/.cache/mmoe")


def hostile(name: str, kind: bytes = tarfile.REGTYPE, size: int = 1) -> bytes:
    """A package whose one member is not what it should be."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, "/etc/hostname", size if kind == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(bytes(size)))
    return content.getvalue()


def refused(content: bytes, cache: Path, message: str) -> None:
    cache.mkdir()
    (cache / "made-stamps_1-1.deb").write_bytes(content)
    with pytest.raises(UserError, match=message):
        fetch_stamps(card(content), cache)
    assert [path.name for path in cache.rglob("*")] == ["made-stamps_1-1.deb"]


@pytest.mark.parametrize("name", ["../../out.png", "/out.png", f"./{FOLDER}/../../../../out.png"])
def test_a_member_that_leads_out_is_refused(commands: Path, tmp_path: Path, name: str) -> None:
    del commands
    refused(hostile(name), tmp_path / "cache", "out.png' leads out of the package")
    assert not list(tmp_path.rglob("out.png"))


def test_members_beyond_all_measure_are_refused(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del commands
    monkeypatch.setattr("mmoe.data.prepare.package.LARGEST", 1000)
    refused(hostile("./a.png", size=1001), tmp_path / "cache", "goes beyond 1000 bytes")


@pytest.mark.parametrize("content", [b"", bytes(100), b"x" * 2000])
def test_what_is_no_package_is_refused(commands: Path, tmp_path: Path, content: bytes) -> None:
    del commands
    refused(content, tmp_path / "cache", "no package")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_left_out(commands: Path, tmp_path: Path, kind: bytes) -> None:
    del commands
    cache, content = tmp_path / "cache", hostile(f"./{FOLDER}/a.png", kind)
    cache.mkdir()
    (cache / "made-stamps_1-1.deb").write_bytes(content)
    assert not fetch_stamps(card(content), cache).exists()
