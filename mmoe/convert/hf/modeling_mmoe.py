"""The exported model: encoders and a connector, whose rows replace a LongCat-Flash model's ``<image>`` embeddings."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LongcatFlashForCausalLM, PreTrainedModel

from mmoe.convert.hf.configuration_mmoe import MmoeConfig
from mmoe.models.connectors import build_connector
from mmoe.models.encoders import build_encoder
from mmoe.recipe.model import MLP, SVA, ConvNet, ConvNeXt, Linear, ViT

ENCODERS = {"vit": ViT, "convnext": ConvNeXt, "convnet": ConvNet}
CONNECTORS = {"sva": SVA, "mlp": MLP, "linear": Linear}


class MmoeForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """``forward(input_ids [b, s], pixel_values [n, 3, H, W])`` → logits [b, s, vocabulary].

    The n images are those of all rows, in order; each takes a run of ``config.image_tokens`` ``<image>`` tokens.
    """

    config_class = MmoeConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers' own protocol
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["LongcatFlashDecoderLayer"]  # noqa: RUF012
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
                CONNECTORS[config.connector["type"]](**config.connector),
                [part.channels for part in parts],
                [part.grid for part in parts],
                config.text_config.hidden_size,
            )
        self.language_model = LongcatFlashForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pixels [n, 3, H, W], normalised by the processor → [n, image_tokens, hidden_size]."""
        if self.connector is None:
            raise ValueError("this model has no encoders: it reads text only")
        pixel_values = pixel_values.to(self.device, self.dtype)
        return self.connector([encoder(pixel_values) for encoder in self.encoders.values()])

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See the class; everything else (labels, caches, position_ids, …) is for the language model.

        Raises:
            ValueError: images that do not match the ``<image>`` tokens, or images without ``input_ids``.
        """
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids, which say where the images stand")
            embeds: Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            rows = self.get_image_features(pixel_values)
            places = input_ids == self.config.image_token_id
            if int(places.sum()) != rows.shape[0] * rows.shape[1]:
                raise ValueError(f"{int(places.sum())} <image> tokens for {rows.shape[0]} images of {rows.shape[1]}")
            inputs_embeds = embeds.masked_scatter(places.unsqueeze(-1), rows.to(embeds.dtype))
        if inputs_embeds is not None:
            input_ids = None
        return self.language_model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, past_key_values=past_key_values, **kwargs
        )
        # Later steps hold the new tokens alone; the images are in the cache.
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs["pixel_values"] = pixel_values
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Copies every row ``expand_size`` times, and its images as one block: a row may have several, or none."""
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None and input_ids is not None:
            places = (input_ids == self.config.image_token_id).sum(1) // self.config.image_tokens
            blocks = pixel_values.split(places.tolist())
            pixel_values = torch.cat([block for block in blocks for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs if pixel_values is None else {**kwargs, "pixel_values": pixel_values}
