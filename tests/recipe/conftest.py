"""A small complete recipe as a file."""

from pathlib import Path

import pytest

TINY = """\
name = "tiny"

[model.backbone]
vocab_size = 64
hidden_size = 32
layers = 1
heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
ffn_hidden_size = 64

[model.moe]
experts = 4
zero_experts = 2
top_k = 2
expert_hidden_size = 32
active_experts = 1.2

[[model.encoders]]
name = "vit"
type = "vit"
image_size = 32
patch_size = 8
width = 32
layers = 2
heads = 4

[[model.encoders]]
name = "conv"
type = "convnet"
image_size = 32
widths = [16, 32, 64]

[model.connector]
grid = 2
width = 32
heads = 4

[data]
mixture = "scenes"

[train]
steps = 10
global_batch = 4
micro_batch = 2

[optimizer]
lr = 1e-3
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path
