"""LLaVA as transformers' ``LlavaForConditionalGeneration`` stores it: one ViT, two linear maps with GELU between them,
and any language model that is written here.

The tensors' names are those of the published models (llava-hf), which every server reads. Two further layouts are read:
without ``vision_model.``, as transformers 5 saves a CLIP or SigLIP, and with ``model.`` in front and the output layer
apart, as it keeps them in memory.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmoe.convert.families import language, vision
from mmoe.convert.families.fields import token_ids
from mmoe.convert.mapping import Entry, Table
from mmoe.errors import UserError
from mmoe.recipe.checks import Problem, encoder_grid
from mmoe.recipe.model import MLP, Model, ViT

ARCHITECTURE = "LlavaForConditionalGeneration"
INNER = {"clip_vision_model": "vision_model.", "siglip_vision_model": "vision_model.", "dinov2": ""}
"""The encoders of the published models, and what stands in front of their tensors' names there."""
NESTED = "model."
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
"""What transformers takes where a Llama's ``config.json`` says nothing, as those of the published models do."""
VISION = {
    "model_type": "clip_vision_model",
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
"""And where there is no ``vision_config``."""
ONLY = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
"""Fields with the one value that is supported, transformers' default."""
FIX = "export it as MmoeForConditionalGeneration: --format mmoe"


@dataclass(frozen=True)
class Layout:
    """How the tensors of a directory are named."""

    nested: bool = False
    inner: bool = True


def layout(names: Mapping[str, Any]) -> Layout:
    """Of a directory with tensors of these ``names``."""
    return Layout(
        nested=any(name.startswith((f"{NESTED}language_model.", f"{NESTED}vision_tower.")) for name in names),
        inner=any(".vision_model." in name for name in names),
    )


def problems(model: Model) -> Iterator[Problem]:
    """Why ``LlavaForConditionalGeneration`` does not compute what ``model`` does; nothing where it does."""
    if model.mtp is not None:
        yield "model.mtp", "it has no multi-token prediction", FIX
    yield from encoder_problems(model, INNER)
    if len(model.encoders) != 1 or not isinstance(encoder := model.encoders[0], ViT):
        return
    side, connector = encoder.image_size // encoder.patch_size, model.connector
    if not isinstance(connector, MLP):
        yield "model.connector.type", f"its connector is an 'mlp', not {connector.type if connector else None!r}", FIX
        return
    if connector.layers != 2:
        yield "model.connector.layers", f"its connector has 2 linear maps, not {connector.layers}", FIX
    if connector.norm:
        yield "model.connector.norm", "its connector has no LayerNorm", FIX
    if connector.newline:
        yield "model.connector.newline", "it has no tokens that end a row", FIX
    if connector.grid != side:
        yield "model.connector.grid", f"it has the encoder's own grid of {side}, not {connector.grid}", FIX


def encoder_problems(model: Model, kinds: Collection[str]) -> Iterator[Problem]:
    """Why the encoder of ``model`` is none of a LLaVA's, which are one of transformers' ``kinds`` (``model_type``)."""
    if len(model.encoders) != 1:
        yield "model.encoders", f"it has one encoder, not {len(model.encoders)}", FIX
        return
    encoder = model.encoders[0]
    if not isinstance(encoder, ViT):
        yield "model.encoders.0.type", f"its encoder is a ViT, not {encoder.type!r}", FIX
        return
    try:
        kind = vision.family_of(encoder).model_type
    except UserError as error:
        yield error.where, error.what, error.fix
        return
    if kind not in kinds:
        yield "model.encoders.0", f"its encoder is one of {', '.join(kinds)}, not {kind}", FIX
    if encoder.final_norm:
        yield "model.encoders.0.final_norm", "it takes features that no last LayerNorm went over", FIX
    side = encoder.image_size // encoder.patch_size
    if encoder_grid(encoder) != side:
        yield "model.encoders.0.grid", f"it has the encoder's own grid of {side}, not {encoder.grid}", FIX


def table(model: Model, named: Layout | None = None, *, fused: bool = False) -> Table:
    """Every tensor of ``model``, of which :func:`problems` has none, under the names of ``named``, the published ones
    where it is None; ``fused`` as in :func:`mmoe.convert.families.longcat.table`."""
    encoder, named = _encoder(model), named or Layout()
    inner = INNER[vision.family_of(encoder).model_type] if named.inner else ""
    tower = vision.table(encoder, ours=f"encoders.{encoder.name}.", theirs=f"vision_tower.{inner}")
    pairs = (("first", "linear_1"), ("further.0", "linear_2"))
    projector = Table(
        [
            Entry(f"connector.{ours}.{part}", (f"multi_modal_projector.{theirs}.{part}",))
            for ours, theirs in pairs
            for part in ("weight", "bias")
        ]
    )
    text = language.table(model, fused=fused).prefixed(theirs="language_model.")
    whole = tower + projector + text
    return whole.renamed(_nest) if named.nested else whole


def _nest(name: str) -> str:
    """A published name → the one in memory."""
    head, text = "language_model.lm_head.", "language_model.model."
    if name.startswith(head):
        return name.removeprefix("language_model.")
    return NESTED + (f"language_model.{name.removeprefix(text)}" if name.startswith(text) else name)


def to_config(model: Model, dtype: str) -> dict[str, Any]:
    """Its ``config.json``."""
    encoder = _encoder(model)
    text = language.to_config(model, dtype)
    tower = {key: value for key, value in vision.to_config(encoder).items() if key != "architectures"}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llava",
        "dtype": dtype,
        "vision_config": tower,
        "text_config": text,
        **ONLY,
        "vision_feature_layer": their_layer(encoder),
        "vision_feature_select_strategy": strategy(encoder),
        "image_token_index": model.special.image,
        "image_seq_length": model.image_tokens,
        "tie_word_embeddings": text["tie_word_embeddings"],
        **token_ids(model.special),
    }


def their_layer(encoder: ViT) -> int:
    """Our ``feature_layer`` as an index of their hidden states, of which 0 is what the first block reads."""
    return encoder.feature_layer if encoder.feature_layer < 0 else encoder.feature_layer + 1


def with_features(encoder: ViT, layer: Any, key: str, where: str) -> ViT:
    """``encoder`` with the features that ``layer`` names among its hidden states, before its last norm.

    Raises:
        UserError: ``layer``, which stands under ``key`` in a configuration, is no layer's.
    """
    if type(layer) is not int or not -encoder.layers <= layer <= encoder.layers or layer == 0:
        what = f"{key} is {layer!r}"
        raise UserError(what, where, f"only one layer is supported, of ±1 to ±{encoder.layers}")
    return replace(
        encoder,
        feature_layer=layer if layer < 0 else layer - 1,
        final_norm=False,
        pooling="norm" if encoder.pooling == "none" else encoder.pooling,  # its last norm is there all the same
    )


def strategy(encoder: ViT) -> str:
    """``default`` leaves out the first token, the class token."""
    return "default" if encoder.class_token else "full"


def from_config(config: dict[str, Any], where: str, name: str = "vision") -> Model:
    """The model in a ``config.json``; ``name`` is what its encoder is to be called. Its pixels' statistics are those
    that the encoder's family is published with.

    Raises:
        UserError: see :func:`mmoe.convert.families.language.from_config` and
            :func:`mmoe.convert.families.vision.from_config`; or a variant that is not supported, by its field.
    """
    for key, supported in ONLY.items():
        if config.get(key, supported) != supported:
            raise UserError(f"{key} is {config[key]!r}", where, f"only {supported!r} is supported")
    text = config.get("text_config") or {}
    if isinstance(text, dict) and text.get("model_type", "llama") == "llama":
        # The whole model's says whether the output layer is the embedding; the language model's may say so too.
        tied = text.get("tie_word_embeddings", False) or config.get("tie_word_embeddings", False)
        text = {**LLAMA, "model_type": "llama", **text, "tie_word_embeddings": tied}
    backbone, moe = language.from_config(text, where)
    tower = config.get("vision_config") or VISION
    if isinstance(tower, dict):
        tower = {"model_type": "clip_vision_model", **tower}
    encoder = vision.from_config(tower, where, name)
    if not isinstance(encoder, ViT) or tower["model_type"] not in INNER:
        raise UserError(f"its vision_config is a {tower['model_type']}", where, f"give one of {', '.join(INNER)}")
    layer, chosen = config.get("vision_feature_layer", -2), config.get("vision_feature_select_strategy", "default")
    encoder = with_features(encoder, layer, "vision_feature_layer", where)
    if chosen != strategy(encoder):
        what = f"vision_feature_select_strategy is {chosen!r}"
        why = "the class token would be an image token" if encoder.class_token else "the first patch would be left out"
        raise UserError(what, where, f"only {strategy(encoder)!r} is supported with this encoder: {why}")
    connector = MLP(type="mlp", grid=encoder.image_size // encoder.patch_size)
    return Model(backbone=backbone, moe=moe, encoders=(encoder,), connector=connector)


def _encoder(model: Model) -> ViT:
    encoder = model.encoders[0]
    assert isinstance(encoder, ViT)
    return encoder
