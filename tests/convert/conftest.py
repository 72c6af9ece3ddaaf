"""The tiny model's export, and what an untouched Python makes of it."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exporting import MODEL, Exported, Whole, load

from mmoe.convert import to_hf
from mmoe.convert.families import longcat
from mmoe.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Exported:
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    whole = Whole().eval()
    with torch.no_grad():
        for tensor in whole.state_dict().values():
            # Weights that are all 0 or 1 at first (norms, biases, the selection bias) would hide a swapped pair.
            tensor.add_(0.2 * torch.randn_like(tensor) if tensor.ndim < 2 else 0.1 * torch.randn_like(tensor))
    parts = whole.state_dict()
    language = {k.removeprefix("language_model."): v for k, v in parts.items() if k.startswith("language_model.")}
    state = dict(longcat.table(MODEL.backbone, MODEL.moe, fused=True).read(language, "the composition"))
    state |= {k: v for k, v in parts.items() if not k.startswith("language_model.")}
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(["how many zebras ?", " 3", "a frog", "left of"], 300).save(str(tokenizer))
    to_hf(folder / "checkpoint", folder / "hf", load=load(state, tokenizer))
    to_hf(folder / "checkpoint", folder / "bf16", "bf16", load=load(state, tokenizer))
    return Exported(whole, state, tokenizer, folder / "hf")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies an export's code to this test's folder and imports it from there; no other test finds it."""
    from transformers import dynamic_module_utils

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]
        importlib.invalidate_caches()

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # it puts its folder there
    forget()
    yield
    forget()


@pytest.fixture(scope="session")
def foreign(exported, tmp_path_factory) -> dict:
    """What ``foreign.py`` found in the export, in a Python that cannot import mmoe."""
    folder = tmp_path_factory.mktemp("foreign")
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("foreign.py")), str(exported.out), str(folder)]
    run = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return torch.load(folder / "found.pt")
