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
from mmoe.checkpoint.tensors import Part, Rows, Tensors, View, lazy
from mmoe.convert import processor, towers
from mmoe.convert.families import cambrian, llava, llava_llama, longcat, multimodal
from mmoe.convert.families import language as language_family
from mmoe.convert.families.fields import token_ids
from mmoe.convert.mapping import Table
from mmoe.convert.ship import ship
from mmoe.convert.weights import INDEX, SHARD, plan
from mmoe.data.pixels import Fit
from mmoe.errors import UserError
from mmoe.progress import progress
from mmoe.recipe.load import dump_recipe
from mmoe.recipe.model import Model, ViT
from mmoe.recipe.schema import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECIPE = "mmoe_recipe.toml"

Format = Literal["auto", "llava", "llava_llama", "cambrian", "mmoe"]
Kind = Literal["llava", "llava_llama", "cambrian", "mmoe"]
ZeroExperts = Literal["zeros", "drop"]
FAMILIES = {"llava": llava, "llava_llama": llava_llama, "cambrian": cambrian}
RELEASED = {"llava_llama": llava_llama, "cambrian": cambrian}
"""Layouts of released code, with the encoders in folders of their own."""
Load = Callable[[Path], tuple[Recipe, Mapping[str, Tensor], Path]]


def to_hf(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    load: Load | None = None,
    max_shard_size: str = SHARD,
    form: Format = "auto",
    zero_experts: ZeroExperts = "zeros",
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
        form: of the whole model: ``llava``, ``mmoe`` (with its own code), ``auto``, the first of these that can be, or
            a release's layout: ``llava_llama``, LLaVA's and Yi-VL's, or ``cambrian``, Cambrian-1's.
        zero_experts: what becomes of the projections that LongCat-Flash's zero experts have and no computation reads,
            where each expert has tensors of its own: ``zeros``, as transformers wants, or ``drop`` them, as vLLM does.

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
    tokens = processor.with_image(processor.read_tokens(tokenizer, model.special))
    kind = _kind(recipe, form, tokens)
    folders = _folders(model, state, wanted, kind, zero_experts)
    files: list[stream.File] = []
    indices: dict[Path, bytes | None] = {}
    for folder, tensors in folders.items():
        apart = longcat.no_parameters(tensors)
        planned, indices[Path(folder, INDEX)] = plan(tensors, folder, max_shard_size, apart)
        files += planned
    with stream.alone(partial):
        checked = nullcontext() if load else layout.verified(checkpoint)
        with checked, progress("to-hf", sum(file.nbytes for file in files)) as advance:
            stream.write(partial, files, advance, stream.CRC32)
        for path, content in indices.items():
            if content:
                (partial / path).write_bytes(content)
        language = "language" if kind else ""
        stored = {folder: _stored(folders[folder]) for folder in {language, ""}}
        notes = _describe(partial, recipe, tokens, stored[language], stored[""] if kind else None, kind)
        _publish(partial, out)
    for note in notes:
        print(note)


def _kind(recipe: Recipe, form: Format, tokens: processor.Tokens) -> Kind | None:
    """What the whole model becomes: ``LlavaForConditionalGeneration``, a release's class or our own. None where there
    is none but the language model.

    Raises:
        UserError: it is to be one of transformers' or of a release, and cannot.
    """
    if form in FAMILIES:
        found = next(FAMILIES[form].problems(recipe.model), None)
        if found:
            path, what, fix = found
            raise UserError(f"{FAMILIES[form].ARCHITECTURE} has no such model: {what}", path, fix)
    if form == "cambrian" or form == "llava_llama":
        return form
    if not recipe.model.encoders:
        return None
    if form == "mmoe" or next(llava.problems(recipe.model), None):
        return "mmoe"
    if tokens.knows_image:
        return "llava"
    if tokens.special.image < tokens.size:
        what = f"model.special.image is {tokens.special.image}, {tokens.image!r}, as which texts are read"
        raise UserError(what, "tokenizer.json", "import the model again, or take --format mmoe")
    if form == "llava":
        what = f"it has no token {tokens.special.image}, which stands for a picture"
        raise UserError(what, "tokenizer.json", "give a tokenizer with that token, or take --format mmoe")
    return "mmoe"


def _folders(
    model: Model, state: Tensors, dtype: torch.dtype | None, kind: Kind | None, zero_experts: ZeroExperts
) -> dict[str, Tensors]:
    """The tensors of each folder of an export, by its path there."""

    def kept(table: Table) -> Table:
        return dataclasses.replace(table, padding={}) if zero_experts == "drop" else table

    if zero_experts == "drop" and not language_family.table(model).padding:
        what = "there are no zero experts whose tensors it could leave out"
        raise UserError(what, "--zero-experts drop", "leave the option out")
    language = kept(language_family.table(model))
    if kind is None:
        return {"": language.write(state, dtype)}
    folders = {"language": language.write(Part(state, "language."), dtype)}
    if kind not in RELEASED:
        whole = (llava if kind == "llava" else multimodal).table(model)
        return folders | {"": kept(whole).write(state, dtype)}
    family = RELEASED[kind]
    for encoder in model.encoders:
        prefix = f"encoders.{encoder.name}."
        table = towers.layout_of(encoder)[1].prefixed(ours=prefix)
        folders[f"{family.ENCODERS}/{encoder.name}"] = table.write(Part(state, prefix), dtype)
    vision = {name: Rows(name) for name in state if not name.startswith("encoders.")}
    return folders | {"": family.table(model).write(View(state, vision), dtype)}


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
    out: Path, recipe: Recipe, tokens: processor.Tokens, language_dtype: str, whole_dtype: str | None, kind: Kind | None
) -> list[str]:
    """Everything but the weights; ``whole_dtype`` is None where the language model is all. Gives notes on what the
    export does not do as training does."""
    model = recipe.model
    language = out / "language" if whole_dtype else out
    (out / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    config = language_family.to_config(model, language_dtype)
    _write_json(language / "config.json", config)
    _write_tokenizer(language, tokens, model.backbone.max_position, images=bool(model.encoders))
    notes: list[str] = []
    if whole_dtype and kind == "llava":
        notes = _describe_llava(out, recipe, tokens, whole_dtype)
    elif whole_dtype and kind in RELEASED:
        notes = _describe_released(out, recipe, tokens, whole_dtype, kind)
    elif whole_dtype:
        _write_json(out / "config.json", _whole_config(recipe, config, whole_dtype))
        _write_tokenizer(out, tokens, model.backbone.max_position, images=True)
        _write_processor(out, recipe)
        ship(out)
    _write_readme(out, recipe, config["architectures"][0], kind, tokens.image)
    return notes


def _describe_llava(out: Path, recipe: Recipe, tokens: processor.Tokens, dtype: str) -> list[str]:
    model, encoder = recipe.model, recipe.model.encoders[0]
    assert isinstance(encoder, ViT)
    _write_json(out / "config.json", llava.to_config(model, dtype))
    data = processor.for_llava(tokens)
    _write_tokenizer(out, tokens, model.backbone.max_position, images=True, data=data)
    fields, notes = processor.image_processor(encoder, recipe.data.fit, recipe.data.interpolation)
    _write_json(out / "preprocessor_config.json", fields)
    _write_json(out / "processor_config.json", processor.processor(encoder, tokens.image))
    return notes


def _describe_released(out: Path, recipe: Recipe, tokens: processor.Tokens, dtype: str, kind: str) -> list[str]:
    model, data, family = recipe.model, recipe.data, RELEASED[kind]
    padded, notes = data.fit == "pad", [family.NOTE]
    # The code pads pictures itself, before the processor: of a square "crop" makes what "stretch" does, and processors
    # of the releases' time refuse a size without a shortest edge.
    fit: Fit = "crop" if padded else data.fit
    if padded:
        for encoder in model.encoders:
            notes += processor.other_border(encoder, f"{encoder.name}: the released code")
    elif fit == "stretch":
        notes.append("preprocessor_config.json stretches pictures; an old CLIPImageProcessor may refuse to")
    shape = {"image_aspect_ratio": "pad" if padded else "square"}
    _write_json(out / "config.json", family.to_config(model, dtype) | shape)
    _write_tokenizer(out, tokens, model.backbone.max_position, images=True)
    for encoder in model.encoders:
        folder = out / family.ENCODERS / encoder.name
        _write_json(folder / "config.json", towers.layout_of(encoder)[0])
        fields, _ = processor.image_processor(encoder, fit, data.interpolation)
        del fields["processor_class"]  # of a LLaVA in transformers
        _write_json(folder / "preprocessor_config.json", fields)
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
        "image_token_id": model.special.image,
        "tie_word_embeddings": False,
        **token_ids(model.special),
    }


def _write_tokenizer(
    out: Path, tokens: processor.Tokens, longest: int, *, images: bool, data: bytes | None = None
) -> None:
    """``data`` is what becomes of the file of ``tokens``, where that changes; ``images``: the model reads them."""
    (out / "tokenizer.json").write_bytes(data or tokens.data)
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("pad_token", "bos_token", "eos_token"), tokens.names, strict=False)),
        **({"extra_special_tokens": [tokens.image]} if images else {}),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    _write_json(out / "tokenizer_config.json", fields)
    _write_json(out / "generation_config.json", token_ids(tokens.special))


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
    _write_json(
        out / "processor_config.json",
        {
            "processor_class": "MmoeProcessor",
            "auto_map": maps,
            "image_tokens": recipe.model.image_tokens,
            "image_token_id": recipe.model.special.image,
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_readme(out: Path, recipe: Recipe, language: str, kind: Kind | None, image: str) -> None:
    stock = WHOLE_README.replace(", trust_remote_code=True", "").replace("<image>", image)
    templates = {"llava": stock, "mmoe": WHOLE_README, None: LANGUAGE_README}
    if kind in RELEASED:
        template = RELEASED_README.replace("SOURCE", RELEASED[kind].SOURCE).replace("FOLDER", RELEASED[kind].ENCODERS)
    else:
        template = templates[kind]
    template = template.replace("LANGUAGE", language)
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
RELEASED_README = """
Trained with mmoe; `mmoe_recipe.toml` is the recipe. In the layout of SOURCE:
the language model and the connector here, the encoders in `FOLDER/`, each a directory of its own. It is for that code,
not for transformers alone; `mmoe convert from-hf` reads it.

`language/` holds the language model alone, for transformers: `LANGUAGE.from_pretrained("language")`.
"""
LANGUAGE_README = """
Trained with mmoe; `mmoe_recipe.toml` is the recipe.

    from transformers import AutoTokenizer, LANGUAGE

    model, tokenizer = LANGUAGE.from_pretrained("."), AutoTokenizer.from_pretrained(".")
"""
