"""Through a real checkpoint: export → from_hf → checkpoint → mmoe.load and to_hf, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys
from pathlib import Path
import torch
from mmoe.checkpoint.load import load
from mmoe.convert import from_hf, to_hf, verify

def main(export, folder):
    from_hf(export, folder / "run")
    checkpoint = folder / "run/checkpoints/step_00000000"
    to_hf(checkpoint, folder / "hf")
    found = torch.load(folder / "inputs.pt")
    loaded = load(checkpoint)
    pairs = (checkpoint, export), (folder / "hf", export), (checkpoint, folder / "hf/language")
    findings = [finding for a, b in pairs for finding in verify(a, b)]
    logits = loaded.logits(found["ids"], found["pixels"])
    torch.save({"findings": findings, "logits": logits}, folder / "found.pt")

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def run(exported, tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(exported), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


FOREIGN = """
import sys
from pathlib import Path
from mmoe.checkpoint.load import load
from mmoe.convert import from_hf, to_hf, verify
from mmoe.errors import UserError

if __name__ == "__main__":
    export, folder = Path(sys.argv[1]), Path(sys.argv[2])
    from_hf(export, folder / "run")
    checkpoint = folder / "run/checkpoints/step_00000000"
    to_hf(checkpoint, folder / "hf")
    assert verify(checkpoint, export) == verify(folder / "hf", export) == []
    assert (folder / "hf/tokenizer.json").read_bytes() == (export / "tokenizer.json").read_bytes()
    try:
        load(checkpoint).tokenizer
    except UserError as error:
        print(error)
"""


def test_a_tokenizer_of_another_kind_is_converted_and_not_used(exported, tmp_path):
    """It changes texts: a normaliser that no published model of ours has."""
    directory = Path(shutil.copytree(exported.out / "language", tmp_path / "theirs"))
    fields = json.loads((directory / "tokenizer.json").read_text())
    fields["normalizer"] = {"type": "Lowercase"}
    (directory / "tokenizer.json").write_text(json.dumps(fields))
    (tmp_path / "script.py").write_text(FOREIGN)
    done = run(directory, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "its normalizer has a Lowercase" in done.stdout


def test_through_a_checkpoint(exported, tmp_path):
    torch.manual_seed(1)
    ids = torch.randint(4, 300, (2, 12))
    ids[0, 1:5] = ids[1, 3:7] = 3
    pixels = torch.randn(2, 3, 32, 32)
    torch.save({"ids": ids, "pixels": pixels}, tmp_path / "inputs.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(exported.out, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "zero experts are not read" in done.stdout
    found = torch.load(tmp_path / "found.pt")
    assert found["findings"] == []
    # Two implementations of every layer in fp32: the acceptance bound of the export.
    torch.testing.assert_close(found["logits"], exported.whole(ids, pixels), atol=1e-4, rtol=0)
