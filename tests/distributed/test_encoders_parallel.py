"""A ViT over two tensor-parallel ranks against one process: features, gradients, checkpoints."""

from pathlib import Path
from typing import Any

import encoder_jobs
import pool
import pytest
import torch

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "every option": {
        "activation": "swiglu",
        "position": "rope",
        "class_token": True,
        "registers": 2,
        "mask_token": True,
        "pre_norm": True,
        "layer_scale": True,
        "query_value_bias": False,
        "key_bias": False,
        "mlp_width": 12,
        "feature_layer": 0,
        "pooling": "attention",
    },
}


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        assert (ours[name] - tensor).abs().max() < 1e-12, name


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_compute_what_one_does(ranks: pool.Pools, name: str, tmp_path: Path) -> None:
    options, gated = OPTIONS[name], "activation" in OPTIONS[name]
    (one,) = ranks(1).run("encoder_jobs", "run", tensor=1, saved=_folder(tmp_path / "one"), **options)
    two = ranks(2).run("encoder_jobs", "run", tensor=2, saved=_folder(tmp_path / "two"), **options)
    assert [result["cut"] for result in (one, *two)] == [False, True, True]
    sharded = {"query.weight", "key.weight", "value.weight", "attention_out.weight", "mlp_in.weight", "mlp_in.bias"}
    assert {f"vit.blocks.1.{part}" for part in sharded} <= two[0]["axes"].keys()
    for result in two:
        close({"": result["features"]}, {"": one["features"]})
    close(encoder_jobs.whole(two, "weights", gated), one["weights"])
    close(encoder_jobs.whole(two, "gradients", gated), one["gradients"])

    (back,) = ranks(1).run("encoder_jobs", "run", tensor=1, resumed=str(tmp_path / "two"), **options)
    for key, weight in one["weights"].items():
        assert torch.equal(back["weights"][key], weight), key
    there = ranks(2).run("encoder_jobs", "run", tensor=2, resumed=str(tmp_path / "one"), **options)
    for key, weight in encoder_jobs.whole(there, "weights", gated).items():
        assert torch.equal(weight, one["weights"][key]), key


@pytest.mark.parametrize("options", [{"heads": 1}, {"mlp_width": 9}])
def test_what_does_not_divide_stays_whole(ranks: pool.Pools, options: dict[str, Any]) -> None:
    (one,) = ranks(1).run("encoder_jobs", "run", tensor=1, **options)
    for result in ranks(2).run("encoder_jobs", "run", tensor=2, **options):
        assert not result["cut"]
        assert not result["axes"]
        close(result["gradients"], one["gradients"])


def _folder(path: Path) -> str:
    path.mkdir()
    return str(path)
