"""A model of 100 GB, nearly all of it holes, through a conversion that is killed once, and back."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from exporting import RECIPE

from mmoe.checkpoint.load import blank, state_dict, weights
from mmoe.checkpoint.stream import JOURNAL
from mmoe.convert.families import longcat
from mmoe.convert.weights import SHARD, Weights, plan
from mmoe.recipe.model import Longcat, Model, MoE
from mmoe.recipe.schema import Precision

pytestmark = pytest.mark.slow
BACKBONE = Longcat(
    vocab_size=131072,
    hidden_size=6144,
    layers=2,
    heads=64,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    ffn_hidden_size=12288,
    max_position=8192,
)
"""LongCat-Flash's sizes (arXiv 2509.01322), two of its layers with wider experts."""
MOE = MoE(experts=512, zero_experts=256, top_k=12, expert_hidden_size=2560, active_experts=8.0)
SCRIPT = """
import resource, sys
from pathlib import Path
from mmoe import convert
getattr(convert, sys.argv[1])(Path(sys.argv[2]), Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
ELEMENTS = {
    ("model.embed_tokens.weight", 7): ("language.embedding.word_embeddings.weight", (0, 7)),
    ("model.layers.1.mlp.experts.3.up_proj.weight", 0): ("language.decoder.layers.1.moe.experts.w1", (3, 1, 0, 0)),
    ("model.layers.0.mlp.experts.511.down_proj.weight", -1): (
        "language.decoder.layers.0.moe.experts.w2",
        (511, 6143, 2559),
    ),
    ("lm_head.weight", -1): ("language.output_layer.weight", (131071, 6143)),
}
"""Theirs that are not zero, and where they stand in ours."""


def sparse_model(directory: Path) -> int:
    """Writes the headers, the elements and holes; returns the bytes of the largest file."""
    recipe = dataclasses.replace(RECIPE, model=Model(backbone=BACKBONE, moe=MOE), precision=Precision(dtype="bf16"))
    theirs = longcat.table(BACKBONE, MOE, fused=False).write(weights(blank(recipe)))
    files, _ = plan(theirs, "", SHARD)
    directory.mkdir()
    for file in files:
        header, *stretches = file.parts
        assert isinstance(header, bytes)
        with (directory / file.path).open("wb") as out:
            out.write(header)
            out.truncate(file.nbytes)
            place = len(header)
            for stretch in stretches:
                for name, element in ELEMENTS:
                    if name == stretch.name:
                        out.seek(place + 2 * (element % stretch.count))
                        out.write(torch.tensor([value(name)], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
                place += file.size(stretch)
    (directory / "config.json").write_text(json.dumps(longcat.to_config(BACKBONE, MOE, "bfloat16")))
    (directory / "tokenizer.json").write_text("{}")
    assert sum(file.nbytes for file in files) > 100e9
    return max(file.nbytes for file in files)


def within(told: str, largest: int) -> bool:
    """The peak, with libraries of 0.4 GB and the pieces, while tensors here have up to 16 GB and files ``largest``."""
    return int(told.split()[-1]) < min(2 * largest, 1 << 30)


def value(name: str) -> float:
    return float(len(name))


def test_a_model_of_100_gb(tmp_path: Path) -> None:
    largest = sparse_model(tmp_path / "hf")
    command = [sys.executable, "-c", SCRIPT, "from_hf", str(tmp_path / "hf"), str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    part = tmp_path / "run/checkpoints/.step_00000000.part"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as first:
        while not (part / JOURNAL).exists() or len(json.loads((part / JOURNAL).read_text())["files"]) < 3:
            assert first.poll() is None
            time.sleep(0.5)
        first.kill()
    assert not (tmp_path / "run/checkpoints/latest").exists()
    kept = json.loads((part / JOURNAL).read_text())["files"]
    before = {name: (part / name).stat() for name in kept}

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "run/checkpoints/step_00000000"
    for name, stat in before.items():
        now = (checkpoint / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), name
    assert within(done.stdout, largest)
    _, tensors, _ = state_dict(checkpoint)
    assert sum(spec.nbytes for spec in tensors.specs.values()) > 100e9
    for (theirs, _), (name, index) in ELEMENTS.items():
        found, shape = torch.zeros(3, dtype=torch.bfloat16), tensors.specs[name].shape
        flat = sum(i * stride for i, stride in zip(index, torch.empty(shape, device="meta").stride(), strict=True))
        first = min(max(flat - 1, 0), tensors.specs[name].numel - 3)
        tensors.read(name, first, found)
        wanted = torch.zeros(3, dtype=torch.bfloat16)
        wanted[flat - first] = value(theirs)
        assert torch.equal(found, wanted), name

    back = [sys.executable, "-c", SCRIPT, "to_hf", str(checkpoint), str(tmp_path / "back")]
    done = subprocess.run(back, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert within(done.stdout, largest)
    there, again = Weights(tmp_path / "hf"), Weights(tmp_path / "back")
    assert again.specs == there.specs
    for name, element in ELEMENTS:
        count = there.specs[name].numel
        first = min(max(element % count - 1, 0), count - 3)
        found, wanted = (torch.empty(3, dtype=torch.bfloat16) for _ in range(2))
        again.read(name, first, found)
        there.read(name, first, wanted)
        assert wanted.any()
        assert torch.equal(found, wanted), name
