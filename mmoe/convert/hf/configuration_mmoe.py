"""Configuration of an exported model: the language model's own, and the recipe's tables of encoders and connector."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


class MmoeConfig(PretrainedConfig):
    """Vision encoders and a connector in front of a language model.

    Args:
        text_config: the language model, or its fields, ``model_type`` among them.
        encoders: fields of each encoder, in the order of the connector's inputs.
        connector: fields of the connector; it makes ``image_tokens`` tokens of an image.
        image_token_id: the token whose embeddings the connector's rows replace.
    """

    model_type = "mmoe"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        encoders: list[dict[str, Any]] | None = None,
        connector: dict[str, Any] | None = None,
        image_token_id: int = 3,
        **kwargs: Any,
    ) -> None:
        fields: Any = text_config if text_config is not None else {"model_type": "longcat_flash"}
        if isinstance(fields, dict):
            fields = CONFIG_MAPPING[fields["model_type"]](**fields)
        self.text_config = fields
        self.encoders = encoders or []
        self.connector = connector
        self.image_token_id = image_token_id
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return self.connector["grid"] * (self.connector["grid"] + self.connector["newline"]) if self.connector else 0
