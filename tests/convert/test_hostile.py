"""Hugging Face directories that somebody altered: nothing in one is run, and each has a defined end."""

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import Exported
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmoe.checkpoint import load
from mmoe.convert import from_hf, read_hf
from mmoe.errors import UserError

pytestmark = pytest.mark.latest
FILES: dict[str, bytes] = {}
"""A directory's weights before the first change."""


@pytest.fixture
def whole(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.out, tmp_path / "hf"))


@pytest.fixture
def language(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.out / "language", tmp_path / "hf"))


def configure(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads((directory / "config.json").read_text())
    change(fields)
    (directory / "config.json").write_text(json.dumps(fields))


def test_code_in_the_directory_is_not_run(whole: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for source in whole.glob("*.py"):
        source.write_text(f"open({str(marker)!r}, 'w')")
    configure(whole, lambda fields: fields.update(auto_map={"AutoConfig": "somebody/else--code.Config"}))
    assert read_hf(whole).state
    assert not marker.exists()


def test_pickles_are_not_read(language: Path) -> None:
    (language / "model.safetensors").unlink()
    torch.save({"a": print}, language / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors files"):
        read_hf(language)


def test_an_index_leads_nowhere(language: Path) -> None:
    names = {"model.norm.weight": "../../outside.safetensors", "lm_head.weight": "/etc/passwd"}
    (language / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert read_hf(language).state


@pytest.mark.parametrize("content", [b"[1]", b"null", b"[" * 100_000, b"9" * 5000, b"\xff", b"{}"])
def test_a_configuration_of_something_else(language: Path, content: bytes) -> None:
    (language / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"unreadable config\.json|model_type is None"):
        read_hf(language)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file_is_not_waited_for(language: Path, name: str) -> None:
    (language / name).unlink()
    os.mkfifo(language / name)
    with pytest.raises(UserError, match="it is no regular file"):
        read_hf(language)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 10**9}, "it tells of 4000000000 layers"),
        ({"n_routed_experts": 10**9}, "sizes up to 2000000004"),
        ({"n_routed_experts": 60}, "it tells of 120 layers"),
        ({"zero_expert_num": 300}, "sizes up to 304, no tensor's is above 300"),
        ({"zero_expert_num": 10**9}, "sizes up to 2000000008"),
        ({"zero_expert_num": -1}, "are not numbers of experts"),
        ({"n_routed_experts": 0, "zero_expert_num": 0}, "are not numbers of experts"),
        ({"moe_topk": [1], "n_routed_experts": 2**40}, "are not numbers of experts"),
        ({"moe_topk": 7}, r"model\.moe\.top_k: 7 is above"),
        ({"num_layers": "x"}, "layers must be an integer, found the string 'x'"),
        ({"vocab_size": 1.5}, "vocab_size must be an integer"),
        ({"hidden_size": 2**70}, "hidden_size does not fit in 64 bits"),
        ({"hidden_size": -32}, "hidden_size: -32 is not positive"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ({"routed_scaling_factor": float("nan")}, "nan is not a finite number"),
        ({"hidden_size": 16}, "shapes that do not make up|is .*, by the recipe"),
    ],
)
def test_a_configuration_that_cannot_be(language: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    configure(language, lambda fields: fields.update(change))
    with pytest.raises(UserError, match=message):
        from_hf(language, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(text_config=[]), r"model_type is \[\]"),
        (lambda f: f.update(encoders={}), "no encoders"),
        (lambda f: f.update(connector=[]), "it must be a table"),
        (lambda f: f["connector"].update(grid=10**9), "does not divide the grid"),
        (lambda f: f["encoders"][0].update(type="os.system"), "type must be one of"),
        (lambda f: f["encoders"][0].update(layers=10**9), "it tells of 1000000006 layers"),
        (lambda f: f["encoders"][0].update(width=10**9), "sizes up to 1000000000"),
        (lambda f: f["encoders"][1].update(widths=[8, 8, 8 * 10**8]), "sizes up to 800000000, no tensor's"),
        (lambda f: f["encoders"][1].update(widths=[8, 8, 12]), "12 is not a multiple of 8"),
        (lambda f: [e.update(image_size=2**20) for e in f["encoders"]], "sizes up to 17179869184, no tensor's"),
        (lambda f: f.update(encoders=[{**f["encoders"][0], "name": f"e{i}"} for i in range(999)]), "it tells of 10"),
        (lambda f: f["encoders"][1].update(widths="abc"), "widths must be a list"),
        (lambda f: f["encoders"][1].update(more=1), "unknown key 'more'"),
    ],
)
def test_parts_that_cannot_be(whole: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    configure(whole, change)
    with pytest.raises(UserError, match=message):
        read_hf(whole)


def parts(directory: Path) -> tuple[dict[str, Any], bytes]:
    content = (directory / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def write(directory: Path, header: bytes, body: bytes, length: int | None = None) -> None:
    size = struct.pack("<Q", len(header) if length is None else length)
    (directory / "model.safetensors").write_bytes(size + header + body)


@pytest.mark.parametrize("length", [2**63, 10**9, 0, 3])
def test_a_header_longer_or_shorter_than_it_is(language: Path, length: int) -> None:
    header, body = parts(language)
    write(language, json.dumps(header).encode(), body, length)
    with pytest.raises(UserError, match="unreadable"):
        read_hf(language)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": [0, 2**62]}, "unreadable"),
        ({"data_offsets": [-1, 3]}, "unreadable"),
        ({"data_offsets": [64, 0]}, "unreadable"),
        ({"shape": [2**40, 2**40]}, "unreadable"),
        ({"dtype": "X"}, "unreadable"),
        ({"dtype": "I32"}, r"lm_head\.weight is torch\.int32"),
        ({"shape": [300, 16, 2]}, r"output_layer\.weight is \[300, 16, 2\], by the recipe \[300, 32\]"),
    ],
)
def test_a_header_that_cannot_be(language: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    header, body = parts(language)
    header["lm_head.weight"] |= change
    write(language, json.dumps(header).encode(), body)
    with pytest.raises(UserError, match=message):
        from_hf(language, tmp_path / "out")


def test_tensors_that_overlap_or_come_twice(language: Path) -> None:
    header, body = parts(language)
    first, second = [name for name in header if name != "__metadata__"][:2]
    overlapping = {**header, second: {**header[second], "data_offsets": header[first]["data_offsets"]}}
    for text in (json.dumps(overlapping), json.dumps(header)[:-1] + f', "{first}": {json.dumps(header[second])}' + "}"):
        write(language, text.encode(), body)
        with pytest.raises(UserError, match="unreadable"):
            read_hf(language)
    write(language, json.dumps(header).encode(), body)
    shutil.copy(language / "model.safetensors", language / "other.safetensors")
    with pytest.raises(UserError, match="is in another file too"):
        read_hf(language)


def test_a_recipe_of_another_model(whole: Path, tmp_path: Path) -> None:
    recipe = whole / "mmoe_recipe.toml"
    recipe.write_text(recipe.read_text().replace("layers = 2", "layers = 1", 1))
    with pytest.raises(UserError, match=r"decoder\.layers\.1\..*, by the recipe absent"):
        from_hf(whole, tmp_path / "out")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("layers = 2", "layers = 1000000000", "it tells of 100000000[0-9] layers"),
        ("experts = 4", "experts = 1000000000", "sizes up to"),
        ("ffn_hidden_size = 24", "ffn_hidden_size = 1000000000", "sizes up to 1000000000"),
        # Each of these sizes is there, together they would be 80 GB.
        ("ffn_hidden_size = 24", "ffn_hidden_size = 40000", r"by the recipe \[80000, 32\]"),
    ],
)
def test_a_recipe_larger_than_the_weights(whole: Path, tmp_path: Path, before: str, after: str, message: str) -> None:
    recipe = whole / "mmoe_recipe.toml"
    assert before in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(before, after, 1))
    with pytest.raises(UserError, match=message):
        from_hf(whole, tmp_path / "out")


def test_a_recipe_is_not_built_before_its_shapes_are_known(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    real = load.build
    monkeypatch.setattr(load, "build", lambda recipe: built.append(real(recipe)) or built[-1])
    recipe = whole / "mmoe_recipe.toml"
    recipe.write_text(recipe.read_text().replace("ffn_hidden_size = 24", "ffn_hidden_size = 40", 1))
    with pytest.raises(UserError, match="by the recipe"):
        from_hf(whole, tmp_path / "out")
    (network,) = built
    assert {tensor.device.type for tensor in network.parameters()} == {"meta"}


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4))
def test_a_fuzzed_header_is_refused_or_read(language: Path, changes: list[tuple[float, bytes]]) -> None:
    content = bytearray(FILES.setdefault(str(language), (language / "model.safetensors").read_bytes()))
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for place, replaced in changes:
        start = int(place * end)
        content[start : start + len(replaced)] = replaced
    (language / "model.safetensors").write_bytes(content)
    with contextlib.suppress(UserError):
        assert read_hf(language).state
