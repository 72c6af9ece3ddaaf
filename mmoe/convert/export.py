"""From a checkpoint to Hugging Face directories that need transformers alone."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmoe.checkpoint import layout, stream
from mmoe.checkpoint.tensors import Part, Tensors, lazy
from mmoe.convert import processor
from mmoe.convert.families import language as language_family
from mmoe.convert.families import llava, multimodal
from mmoe.convert.ship import ship
from mmoe.convert.weights import INDEX, SHARD, plan
from mmoe.errors import UserError
from mmoe.progress import progress
from mmoe.recipe.load import dump_recipe
from mmoe.recipe.model import ViT
from mmoe.recipe.schema import Recipe
from mmoe.recipe.tokens import BOS, EOS, IMAGE, PAD, SPECIAL

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKEN_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
RECIPE = "mmoe_recipe.toml"

Format = Literal["auto", "llava", "mmoe"]
Load = Callable[[Path], tuple[Recipe, Mapping[str, Tensor], Path]]


def to_hf(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    load: Load | None = None,
    max_shard_size: str = SHARD,
    form: Format = "auto",
) -> None:
    """Write OUT/language, transformers' own language model, and OUT, the whole model: transformers' own
    ``LlavaForConditionalGeneration`` where that computes the same, else one with the code to run it.

    A recipe without encoders is a language model alone, and OUT itself is that. OUT is there
    once it is whole; a conversion that was broken off goes on where it was.

    Args:
        checkpoint: a checkpoint's folder.
        out: the directory to write; it may exist only if it is empty or an earlier export.
        dtype: ``fp32`` or ``bf16`` to convert to; None keeps the checkpoint's types. The router stays in fp32.
        load: gives (recipe, tensors, path of tokenizer.json); :func:`mmoe.checkpoint.load.state_dict` if None, and then
            the checkpoint's files are held against their checksums.
        max_shard_size: of a file, as "5GB".
        form: of the whole model: ``llava``, ``mmoe`` (with its own code), or ``auto``, the first that can be.

    Raises:
        UserError: the checkpoint cannot be read, transformers has no such model, or OUT holds something else.
    """
    from mmoe.checkpoint.load import state_dict

    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", "--dtype", f"choose one of {', '.join(DTYPES)}")
    out = out.absolute()
    _check_room(out)
    partial = out.with_name(f".{out.name}.part")
    recipe, found, tokenizer = (load or state_dict)(checkpoint)
    language_family.check_expressible(recipe.model)
    state, wanted, model = lazy(found), DTYPES[dtype] if dtype else None, recipe.model
    tokens = processor.read_tokenizer(tokenizer)
    stock = _is_stock(recipe, form, tokens)
    of_whole = (llava if stock else multimodal).table(model) if model.encoders else None
    whole = of_whole.write(state, wanted) if of_whole else None
    table = language_family.table(model)
    language = table.write(Part(state, "language.") if whole else state, wanted)

    folder = "language" if whole else ""
    files, index = plan(language, folder, max_shard_size)
    indices = {Path(folder, INDEX): index}
    if whole:
        more, indices[Path(INDEX)] = plan(whole, "", max_shard_size)
        files += more
    with stream.alone(partial):
        checked = nullcontext() if load else layout.verified(checkpoint)
        with checked, progress("to-hf", sum(file.nbytes for file in files)) as advance:
            stream.write(partial, files, advance, stream.CRC32)
        for path, content in indices.items():
            if content:
                (partial / path).write_bytes(content)
        notes = _describe(partial, recipe, tokens, _stored(language), _stored(whole) if whole else None, stock)
        _publish(partial, out)
    for note in notes:
        print(note)


def _is_stock(recipe: Recipe, form: Format, tokens: processor.Tokens) -> bool:
    """Whether the whole model becomes a ``LlavaForConditionalGeneration``.

    Raises:
        UserError: it is to, and cannot.
    """
    if not recipe.model.encoders and form != "llava":
        return False
    misfit = next(llava.problems(recipe.model), None)
    if misfit and form == "llava":
        path, what, fix = misfit
        raise UserError(f"LlavaForConditionalGeneration has no such model: {what}", path, fix)
    if misfit or form == "mmoe":
        return False
    size = recipe.model.backbone.vocab_size
    if tokens.image is not None and tokens.image < size:
        return True
    if form == "llava":
        what = f"its {SPECIAL[IMAGE]} is {tokens.image}, of {size} tokens"
        raise UserError(what, "tokenizer.json", "give a tokenizer with that token, or take --format mmoe")
    return False


def _check_room(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError("is a file", str(out), "name a directory")
    if out.is_dir() and any(out.iterdir()) and not (out / RECIPE).is_file():
        raise UserError("the directory is not empty", str(out), "name another one")


def _publish(partial: Path, out: Path) -> None:
    """Makes ``partial`` OUT, in place of an earlier export."""
    for path in sorted(partial.rglob("*"), reverse=True):
        layout.sync(path)
    layout.sync(partial)
    if out.is_dir():
        shutil.rmtree(out)
    stream.publish(partial, out)


def _stored(tensors: Tensors) -> str:
    """The name of the weights' type."""
    dtype = next(spec.dtype for name, spec in tensors.specs.items() if name.endswith("embed_tokens.weight"))
    return str(dtype).removeprefix("torch.")


def _describe(
    out: Path, recipe: Recipe, tokens: processor.Tokens, language_dtype: str, whole_dtype: str | None, stock: bool
) -> list[str]:
    """Everything but the weights; ``whole_dtype`` is None where the language model is all. Gives notes on what the
    export does not do as training does."""
    model = recipe.model
    language = out / "language" if whole_dtype else out
    (out / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    config = language_family.to_config(model, language_dtype)
    _write_json(language / "config.json", config)
    _write_tokenizer(language, tokens, tokens.data, model.backbone.max_position)
    notes: list[str] = []
    if whole_dtype and stock:
        notes = _describe_llava(out, recipe, tokens, whole_dtype)
    elif whole_dtype:
        _write_json(out / "config.json", _whole_config(recipe, config, whole_dtype))
        _write_tokenizer(out, tokens, tokens.data, model.backbone.max_position)
        _write_processor(out, recipe)
        ship(out)
    _write_readme(out, recipe, config["architectures"][0], stock)
    return notes


def _describe_llava(out: Path, recipe: Recipe, tokens: processor.Tokens, dtype: str) -> list[str]:
    model, encoder = recipe.model, recipe.model.encoders[0]
    assert isinstance(encoder, ViT)
    assert tokens.image is not None
    _write_json(out / "config.json", llava.to_config(model, dtype, tokens.image) | TOKEN_IDS)
    _write_tokenizer(out, tokens, processor.with_bos(tokens), model.backbone.max_position)
    fields, notes = processor.image_processor(encoder, recipe.data.fit, recipe.data.interpolation)
    _write_json(out / "preprocessor_config.json", fields)
    _write_json(out / "processor_config.json", processor.processor(encoder))
    return notes


def _whole_config(recipe: Recipe, language: dict[str, Any], dtype: str) -> dict[str, Any]:
    model = recipe.model
    assert model.connector is not None
    return {
        "architectures": ["MmoeForConditionalGeneration"],
        "model_type": "mmoe",
        "auto_map": {
            "AutoConfig": "configuration_mmoe.MmoeConfig",
            "AutoModel": "modeling_mmoe.MmoeForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_mmoe.MmoeForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_mmoe.MmoeForConditionalGeneration",
        },
        "dtype": dtype,
        "text_config": language,
        "encoders": [dataclasses.asdict(encoder) for encoder in model.encoders],
        "connector": dataclasses.asdict(model.connector),
        "image_token_id": IMAGE,
        "tie_word_embeddings": False,
        **TOKEN_IDS,
    }


def _write_tokenizer(out: Path, tokens: processor.Tokens, data: bytes, longest: int) -> None:
    """``data`` is what becomes of the file of ``tokens``."""
    (out / "tokenizer.json").write_bytes(data)
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": tokens.names[PAD],
        "bos_token": tokens.names[BOS],
        "eos_token": tokens.names[EOS],
        "extra_special_tokens": [SPECIAL[IMAGE]],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    _write_json(out / "tokenizer_config.json", fields)
    _write_json(out / "generation_config.json", TOKEN_IDS)


def _write_processor(out: Path, recipe: Recipe) -> None:
    maps = {
        "AutoImageProcessor": "processing_mmoe.MmoeImageProcessor",
        "AutoProcessor": "processing_mmoe.MmoeProcessor",
    }
    sizes = recipe.model.image_sizes
    image = {
        "image_processor_type": "MmoeImageProcessor",
        "image_size": sizes[0] if len(sizes) == 1 else list(sizes),
        "fit": recipe.data.fit,
        "interpolation": recipe.data.interpolation,
        "auto_map": maps,
    }
    _write_json(out / "preprocessor_config.json", image | {"processor_class": "MmoeProcessor"})
    tokens = recipe.model.image_tokens
    _write_json(
        out / "processor_config.json", {"processor_class": "MmoeProcessor", "auto_map": maps, "image_tokens": tokens}
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_readme(out: Path, recipe: Recipe, language: str, stock: bool) -> None:
    whole = WHOLE_README.replace(", trust_remote_code=True", "") if stock else WHOLE_README
    template = (whole if recipe.model.encoders else LANGUAGE_README).replace("LANGUAGE", language)
    title = f"# {recipe.name}\n\n{recipe.description}".rstrip()
    (out / "README.md").write_text(f"---\nlibrary_name: transformers\n---\n{title}\n{template}", encoding="utf-8")


WHOLE_README = """
Trained with mmoe; `mmoe_recipe.toml` is the recipe. Needs transformers, torch, numpy and Pillow, nothing else.

    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(".", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
    inputs = processor(text="<image>how many zebras ?", images="picture.png", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16)
    print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))

`language/` holds the language model alone: `LANGUAGE.from_pretrained("language")`.
"""
LANGUAGE_README = """
Trained with mmoe; `mmoe_recipe.toml` is the recipe.

    from transformers import AutoTokenizer, LANGUAGE

    model, tokenizer = LANGUAGE.from_pretrained("."), AutoTokenizer.from_pretrained(".")
"""
