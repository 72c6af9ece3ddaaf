"""The exported model: encoders and a connector, whose rows replace a language model's ``<image>`` embeddings."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from mmoe.convert.hf.configuration_mmoe import MmoeConfig
from mmoe.models.connectors import SVAConnector, build_connector
from mmoe.models.connectors.sampler import numbered, samplers
from mmoe.models.encoders import build_encoder
from mmoe.recipe.model import MLP, SVA, ConvNet, ConvNeXt, Inside, Linear, ViT

ENCODERS = {"vit": ViT, "convnext": ConvNeXt, "convnet": ConvNet}
PIXELS = "pixel_values"
CONNECTORS = {"sva": SVA, "mlp": MLP, "linear": Linear}


class MmoeForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """``forward(input_ids [b, s], pixel_values [n, 3, H, W])`` → logits [b, s, vocabulary].

    The n images are those of all rows, in order; each takes a run of ``config.image_tokens`` ``<image>`` tokens. Where
    the encoders read images of several sizes, ``pixel_values_SIDE`` are those of each, as the processor gives them;
    ``original_sizes`` [n, 2] are the heights and widths that a connector needs which masks padding.
    """

    config_class = MmoeConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers' own protocol
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["LongcatFlashDecoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"model\.mtp\..*"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["classifier.weight", "e_score_correction_bias"]  # noqa: RUF012

    def __init__(self, config: MmoeConfig) -> None:
        super().__init__(config)
        encoders = [ENCODERS[fields["type"]](**fields) for fields in config.encoders]
        self.encoders = nn.ModuleDict({encoder.name: build_encoder(encoder) for encoder in encoders})
        self.connector = None
        if config.connector is not None:
            parts: list[Any] = list(self.encoders.values())
            self.connector = build_connector(
                _connector(config.connector),
                [part.channels for part in parts],
                [part.grid for part in parts],
                config.text_config.hidden_size,
            )
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def _features(self, pixels: dict[str, Tensor]) -> list[list[Tensor]]:
        """Every encoder's maps of features."""
        if self.connector is None:
            raise ValueError("this model has no encoders: it reads text only")
        sizes = [fields["image_size"] for fields in self.config.encoders]
        one = len(set(sizes)) == 1
        given = [pixels[PIXELS if one else f"{PIXELS}_{size}"].to(self.device, self.dtype) for size in sizes]
        return [encoder(part) for encoder, part in zip(self.encoders.values(), given, strict=True)]

    def get_image_features(
        self, pixel_values: Tensor | None = None, original_sizes: Tensor | None = None, **pixels: Tensor
    ) -> Tensor:
        """Images, normalised by the processor → [n, image_tokens, hidden_size]."""
        given = pixels if pixel_values is None else {PIXELS: pixel_values}
        features = self._features(given)
        assert self.connector is not None
        return self.connector(features, original_sizes)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        original_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See the class; everything else (labels, caches, position_ids, …) is for the language model.

        Raises:
            ValueError: images that do not match the ``<image>`` tokens, or images without ``input_ids``.
        """
        pixels = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(f"{PIXELS}_")}
        pixels |= {} if pixel_values is None else {PIXELS: pixel_values}
        pixels = {name: part for name, part in pixels.items() if part is not None}
        with contextlib.ExitStack() as hooks:
            if pixels:
                if input_ids is None:
                    raise ValueError("images need input_ids, which say where the images stand")
                embeds: Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
                inputs_embeds = self._splice(input_ids, embeds, self._features(pixels), original_sizes, hooks)
            if inputs_embeds is not None:
                input_ids = None
            return self.language_model(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )

    def _splice(
        self,
        input_ids: Tensor,
        embeds: Tensor,
        features: list[list[Tensor]],
        sizes: Tensor | None,
        hooks: contextlib.ExitStack,
    ) -> Tensor:
        """Embeddings [b, s, D] with the images' rows in their places; connector layers within the language model hang
        behind its layers until ``hooks`` closes."""
        connector: Any = self.connector
        places = input_ids == self.config.image_token_id
        sizes = None if sizes is None else sizes.to(embeds.device)
        seen = connector.see(features, sizes) if isinstance(connector, SVAConnector) else None
        rows = connector.rows(seen) if seen is not None else connector(features, sizes)
        if int(places.sum()) != rows.shape[0] * rows.shape[1]:
            raise ValueError(f"{int(places.sum())} <image> tokens for {rows.shape[0]} images of {rows.shape[1]}")
        if seen is not None and connector.inside is not None:
            inside = self.config.connector["inside"]
            numbers = torch.where(places, numbered(places), -1)
            arguments = (inside["start"], inside["stride"], seen, numbers, connector.grid, connector.tokens)
            for number, function in samplers(connector.inside, *arguments).items():
                layer = self.language_model.model.layers[number]
                handle = layer.register_forward_hook(lambda _, __, out, function=function: function(out))
                hooks.callback(handle.remove)
        return embeds.masked_scatter(places.unsqueeze(-1), rows.to(embeds.dtype))

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """transformers holds arguments against ``forward``'s own, which cannot name the sizes of every model."""
        known = {f"{PIXELS}_{fields['image_size']}" for fields in self.config.encoders}
        rest = {name: value for name, value in model_kwargs.items() if name not in known}
        super()._validate_model_kwargs(rest)  # pyright: ignore[reportAttributeAccessIssue]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        images = {name: kwargs.pop(name) for name in list(kwargs) if _is_of_images(name)}
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, past_key_values=past_key_values, **kwargs
        )
        # Later steps hold the new tokens alone; the images are in the cache.
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs |= images
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Copies every row ``expand_size`` times, and its images as one block: a row may have several, or none."""
        images = {name: kwargs.pop(name) for name in list(kwargs) if _is_of_images(name)}
        if input_ids is not None:
            places = (input_ids == self.config.image_token_id).sum(1) // max(1, self.config.image_tokens)
            for name, part in images.items():
                if part is not None:
                    blocks = part.split(places.tolist())
                    images[name] = torch.cat([block for block in blocks for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | images


def _connector(fields: dict[str, Any]) -> Any:
    inside = fields.get("inside")
    nested = {"inside": Inside(**inside)} if inside else {}
    return CONNECTORS[fields["type"]](**{**fields, **nested})


def _is_of_images(name: str) -> bool:
    return name == "original_sizes" or name.startswith(PIXELS)
