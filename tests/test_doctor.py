"""`mmoe doctor` names every part and tells kernels from fallbacks."""

import warnings

import pytest

from mmoe import cli, doctor, ops


def test_every_part_has_a_state() -> None:
    table = dict(doctor.rows())
    assert all(table.values())
    assert table["torch"].startswith("2.")
    wanted = {"mmoe", "megatron-core", "transformer-engine", "apex", "nvcc", "mpirun", "srun", "OMP_NUM_THREADS"}
    assert wanted <= set(table)
    assert any(name.startswith("CUDA") for name in table)


def test_kernels_and_fallbacks_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.load_library()
    table = dict(doctor.rows())
    assert table["compiled operators"] == str(ops.LIBRARY)
    assert "CPU" in table["operator permute_index"]

    def fail() -> bool:
        warnings.warn("nothing is built", RuntimeWarning, stacklevel=2)
        return False

    monkeypatch.setattr(ops, "load_library", fail)
    table = dict(doctor.rows())
    assert table["compiled operators"] == "not loaded: nothing is built"
    assert table["operator permute_index"] == table["operator router"] == "PyTorch reference"


def test_an_absent_command_and_a_missing_package_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "COMMANDS", {"no-such-command": []})
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    table = dict(doctor.rows())
    assert (table["no-such-command"], table["no-such-package"]) == ("absent", "missing")


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "megatron-core" in capsys.readouterr().out
