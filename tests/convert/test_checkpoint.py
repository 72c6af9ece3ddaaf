"""Through a real checkpoint: export → from_hf → checkpoint → mmoe.load and to_hf, in a process of its own."""

import os
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


def test_through_a_checkpoint(exported, tmp_path):
    torch.manual_seed(1)
    ids = torch.randint(4, 300, (2, 12))
    ids[0, 1:5] = ids[1, 3:7] = 3
    pixels = torch.randn(2, 3, 32, 32)
    torch.save({"ids": ids, "pixels": pixels}, tmp_path / "inputs.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    run = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(exported.out), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "zero experts are not read" in run.stdout
    found = torch.load(tmp_path / "found.pt")
    assert found["findings"] == []
    # Two implementations of every layer in fp32: the acceptance bound of the export.
    torch.testing.assert_close(found["logits"], exported.whole(ids, pixels), atol=1e-4, rtol=0)
