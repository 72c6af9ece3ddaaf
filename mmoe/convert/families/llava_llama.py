"""LLaVA, LLaVA-1.5 and Yi-VL as their own releases store them: ``LlavaLlamaForCausalLM`` of haotian-liu/LLaVA and of
01-ai/Yi (``VL/llava``), a Llama with the connector among its tensors.

The encoder is a ``CLIPVisionModel`` of its own, which ``mm_vision_tower`` names: a folder of the directory in Yi-VL's,
a published one in LLaVA's. A tower that was trained along is stored behind :data:`STORED`.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mmoe.checkpoint.tensors import Rows, Tensors, View
from mmoe.convert.families import language, llama, llava, vision
from mmoe.convert.families.clip import CLIP
from mmoe.convert.families.fields import only, token_ids
from mmoe.convert.mapping import Entry, Table
from mmoe.errors import UserError
from mmoe.recipe.checks import Problem
from mmoe.recipe.model import MLP, Linear, Llama, Model, ViT

ARCHITECTURE = "LlavaLlamaForCausalLM"
MODEL_TYPE = "llava_llama"
"""Of LLaVA's code; Yi-VL's, as LLaVA's did at first, says ``llava``, as does transformers' own class."""
CONNECTOR = re.compile(r"model\.mm_projector\.")
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq$")
"""Of the language model, in what old code stored."""
STORED = "model.vision_tower.vision_tower."
"""In front of the names of a tower that is stored with the rest."""
ENCODERS = "vit"
"""The folder that an export has the encoder's own directory in, as Yi-VL's has."""
SOURCE = f"the released LLaVA or Yi-VL\n(`{ARCHITECTURE}` of haotian-liu/LLaVA, with LayerNorms of 01-ai/Yi)"
NOTE = (
    "haotian-liu/LLaVA takes mm_vision_tower of config.json for a published name or for a path from where it is "
    "started, 01-ai/Yi for a folder of this directory"
)
LINEAR = "linear"
"""``mm_projector_type``, also where a ``config.json`` has none."""
ONLY = {"use_mm_proj": True, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat", "s2": False}
"""Fields with the one value that is supported, theirs where they are left out."""
SQUARES = ("pad", "square")
"""Of ``image_aspect_ratio``: one picture is one square."""
UNKNOWN = 0
"""``<unk>`` of Llama's and Yi's tokenizers, as which no text is read: the released code has no token for a picture."""
FIX = llava.FIX
_PROJECTOR = re.compile(r"mlp([1-9]\d?)x_gelu(_Norm)?")


def is_release(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is one of this layout, and not of transformers' own LLaVA."""
    named = config.get("architectures")
    return config.get("model_type") == MODEL_TYPE or (isinstance(named, list) and ARCHITECTURE in named)


def problems(model: Model) -> Iterator[Problem]:
    """Why the released ``LlavaLlamaForCausalLM`` does not compute what ``model`` does; nothing where it does."""
    if not isinstance(model.backbone, Llama):
        yield "model.backbone.type", f"its language model is a 'llama', not {model.backbone.type!r}", FIX
    else:
        if model.backbone.tied_embeddings:
            yield "model.backbone.tied_embeddings", "its output layer is not the embedding", FIX
        if model.backbone.head_dim * model.backbone.heads != model.backbone.hidden_size:
            yield "model.backbone.head_dim", "its heads together are as wide as the model", FIX
    yield from llava.encoder_problems(model, (CLIP.model_type,))
    connector = model.connector
    if not isinstance(connector, MLP | Linear):
        what = f"its connector is a 'linear' or an 'mlp', not {connector.type if connector else None!r}"
        yield "model.connector.type", what, FIX
        return
    if connector.newline:
        yield "model.connector.newline", "it has no tokens that end a row", FIX
    sides = [encoder.image_size // encoder.patch_size for encoder in model.encoders if isinstance(encoder, ViT)]
    if sides and connector.grid != sides[0]:
        what = f"it has the encoder's own grid of {sides[0]}, not {connector.grid}"
        yield "model.connector.grid", what, FIX


class Divided(NamedTuple):
    """A directory's tensors."""

    language: Tensors
    """With the buffers that old code stores."""
    connector: Tensors
    tower: Tensors
    """Under the names of a ``CLIPVisionModel``; none where the tower is not stored."""
    read: Tensors
    """Language model and connector without buffers."""
    aside: list[str]
    """The others."""


def divided(tensors: Tensors) -> Divided:
    """``tensors`` of a directory, by what they belong to."""
    stored = {name.removeprefix(STORED): Rows(name) for name in tensors if name.startswith(STORED)}
    of_connector = {name: Rows(name) for name in tensors if CONNECTOR.match(name)}
    rest = {name: Rows(name) for name in tensors if not name.startswith(STORED) and name not in of_connector}
    read = of_connector | {name: rows for name, rows in rest.items() if not BUFFERS.match(name)}
    aside = sorted(tensors.keys() - read.keys())
    return Divided(
        language=View(tensors, rest),
        connector=View(tensors, of_connector),
        tower=View(tensors, stored),
        read=View(tensors, read),
        aside=aside,
    )


def group(name: str) -> str:
    """What a tensor that is left aside is counted under."""
    return STORED.rstrip(".") if name.startswith(STORED) else re.sub(r"\d+", "*", name)


def table(model: Model) -> Table:
    """Every tensor of a directory but the encoder's, of a model of which :func:`problems` has none."""
    assert isinstance(model.backbone, Llama)
    return connector(model) + llama.table(model.backbone)


def connector(model: Model) -> Table:
    """The connector's tensors: torch's ``Sequential``, in which GELU has a number and no tensor; a linear map alone."""
    config, front = model.connector, "model.mm_projector"
    assert isinstance(config, MLP | Linear)
    if isinstance(config, Linear):
        return Table(_affine("connector.first", front))
    entries = []
    for layer in range(config.layers):
        place = layer * (3 if config.norm else 2)
        entries += _affine(f"connector.further.{layer - 1}" if layer else "connector.first", f"{front}.{place}")
        if config.norm:
            entries += _affine(f"connector.norms.{layer}", f"{front}.{place + 1}")
    return Table(entries)


def _affine(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}.{part}", (f"{theirs}.{part}",)) for part in ("weight", "bias")]


def to_config(model: Model, dtype: str) -> dict[str, Any]:
    """Its ``config.json`` but ``image_aspect_ratio``."""
    assert isinstance(model.backbone, Llama)
    encoder = _encoder(model)
    normed = isinstance(model.connector, MLP) and model.connector.norm
    return {
        **llama.to_config(model.backbone, dtype),
        **token_ids(model.special),
        "architectures": [ARCHITECTURE],
        "model_type": "llava" if normed else MODEL_TYPE,
        "mm_vision_tower": f"./{ENCODERS}/{encoder.name}",
        "mm_hidden_size": encoder.width,
        "mm_projector_type": projector(model),
        "mm_vision_select_layer": llava.their_layer(encoder),
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
    }


def projector(model: Model) -> str:
    """``mm_projector_type``, of a model of which :func:`problems` has none."""
    config = model.connector
    assert isinstance(config, MLP | Linear)
    return LINEAR if isinstance(config, Linear) else f"mlp{config.layers}x_gelu{'_Norm' if config.norm else ''}"


def tower(directory: Path, config: dict[str, Any]) -> Path | None:
    """The folder of the encoder, where it is one of ``directory``: nothing elsewhere is looked at."""
    named = config.get("mm_vision_tower")
    path = PurePosixPath(named) if isinstance(named, str) and named and "\0" not in named else None
    if path is None or path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    try:
        return directory / path if (directory / path / "config.json").is_file() else None
    except OSError:  # too long a name
        return None


def from_config(config: dict[str, Any], where: str, encoder: dict[str, Any], whose: str) -> Model:
    """The model in a ``config.json`` and in that of its encoder, ``encoder``, which is read from ``whose``.

    Raises:
        UserError: see :func:`mmoe.convert.families.language.from_config` and
            :func:`mmoe.convert.families.vision.from_config`; or a variant that is not supported, by its field.
    """
    backbone, _ = language.from_config({**config, "model_type": "llama"}, where)
    found = vision.from_config(encoder, whose, "clip")
    if not isinstance(found, ViT) or encoder["model_type"] != CLIP.model_type:
        raise UserError(f"it is a {encoder['model_type']}", whose, f"give a {CLIP.model_type}")
    found = llava.with_features(found, config.get("mm_vision_select_layer"), "mm_vision_select_layer", where)
    kind, side = config.get("mm_projector_type", LINEAR), found.image_size // found.patch_size
    named = _PROJECTOR.fullmatch(kind) if isinstance(kind, str) else None
    if named is None and kind != LINEAR:
        fix = "only linear, mlpNx_gelu and mlpNx_gelu_Norm are supported"
        raise UserError(f"mm_projector_type is {kind!r}", where, fix)
    made = Linear(type="linear", grid=side)
    if named is not None:
        made = MLP(type="mlp", grid=side, layers=int(named[1]), norm=named[2] is not None)
    return Model(backbone=backbone, encoders=(found,), connector=made)


def check(config: dict[str, Any], model: Model, where: str) -> list[str]:
    """Notes on what is not as here in a ``config.json`` that is that of the connector and features of ``model``.

    Raises:
        UserError: it is not; by the field on both sides. Or a variant that is not supported.
    """
    for path, what, _ in problems(model):
        if not path.startswith("model.backbone"):
            raise UserError(f"a released LLaVA or Yi-VL has another model: {what}", path, "change the recipe")
    only(config, ONLY, where)
    shape = config.get("image_aspect_ratio")
    if shape is not None and shape not in SQUARES:
        what = f"image_aspect_ratio is {shape!r}"
        raise UserError(what, where, f"only {' and '.join(SQUARES)} are supported: a picture is one square")
    encoder = _encoder(model)
    wanted = {
        "mm_projector_type": (projector(model), "model.connector"),
        "mm_hidden_size": (encoder.width, "model.encoders.0.width"),
        "mm_vision_select_layer": (llava.their_layer(encoder), "model.encoders.0.feature_layer"),
    }
    for key, (value, ours) in wanted.items():
        found = config.get(key, LINEAR if key == "mm_projector_type" else None)
        if found != value:
            raise UserError(f"{key} is {found!r}, {ours} makes it {value!r} by the recipe", where, "change the recipe")
    if config.get("mm_use_im_start_end"):
        return ["mm_use_im_start_end: its pictures stand between <im_start> and <im_end>, which the texts have to have"]
    return []


def _encoder(model: Model) -> ViT:
    (encoder,) = model.encoders
    assert isinstance(encoder, ViT)
    return encoder
