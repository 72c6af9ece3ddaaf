"""How many parameters a recipe's model has, and how many of them a token uses, without building the language model."""

from dataclasses import dataclass

import torch

from mmoe.models.vision import build_vision
from mmoe.recipe.model import Llama, Longcat, Model


@dataclass(frozen=True)
class Count:
    """Parameters by when they compute. ``expert``: one FFN expert in each layer; ``dense``: what every token uses."""

    embedding: int
    dense: int
    expert: int
    experts: int
    vision: int
    mtp: int
    """Of the layer for multi-token prediction, which only training and speculative decoding use."""

    @property
    def total(self) -> int:
        """Without multi-token prediction, as in arXiv 2509.01322's 560B."""
        return self.embedding + self.dense + self.experts * self.expert + self.vision

    def active(self, experts: float) -> float:
        """What a text token uses that goes through ``experts`` FFN experts in each layer. The embedding is not counted:
        a token reads one row of it. So does arXiv 2509.01322, whose 18.6B to 31.3B are those of 0 and 12 experts."""
        return self.dense + experts * self.expert


def _latent_attention(shape: Longcat) -> int:
    """One MLA block with its two latent norms."""
    down = shape.q_lora_rank + shape.kv_lora_rank + shape.qk_rope_head_dim
    queries = shape.q_lora_rank * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
    keys_values = shape.kv_lora_rank * (shape.qk_nope_head_dim + shape.v_head_dim)
    heads = shape.heads * (queries + keys_values + shape.v_head_dim * shape.hidden_size)
    return shape.hidden_size * down + heads + shape.q_lora_rank + shape.kv_lora_rank


def _mtp(shape: Longcat) -> int:
    hidden = shape.hidden_size
    layer = _latent_attention(shape) + 2 * hidden**2 + 3 * hidden * shape.ffn_hidden_size + 5 * hidden
    return shape.vocab_size * hidden + layer


def _layer(model: Model) -> int:
    """What every token uses of one layer."""
    shape, hidden = model.backbone, model.backbone.hidden_size
    ffn = 3 * hidden * shape.ffn_hidden_size
    if isinstance(shape, Longcat):
        assert model.moe is not None
        router = (model.moe.experts + model.moe.zero_experts) * hidden
        return 2 * (_latent_attention(shape) + ffn) + 4 * hidden + router
    return 2 * hidden * shape.head_dim * (shape.heads + shape.kv_heads) + ffn + 2 * hidden


def count(model: Model) -> Count:
    """The parameters of ``model``; zero experts have none but their rows of the router."""
    shape, moe, hidden = model.backbone, model.moe, model.backbone.hidden_size
    embedding = shape.vocab_size * hidden
    tied = isinstance(shape, Llama) and shape.tied_embeddings
    return Count(
        # A tied one is counted where every token uses all of it.
        embedding=0 if tied else embedding,
        dense=shape.layers * _layer(model) + hidden + embedding,
        mtp=_mtp(shape) if model.mtp and isinstance(shape, Longcat) else 0,
        expert=shape.layers * 3 * hidden * moe.expert_hidden_size if moe else 0,
        experts=moe.experts if moe else 0,
        vision=sum(p.numel() for module in vision_modules(model).values() for p in module.parameters()),
    )


def vision_modules(model: Model) -> dict[str, torch.nn.Module]:
    """The encoders and the connector by their names in the model, without storage."""
    with torch.device("meta"):
        return dict(build_vision(model))


def describe(model: Model) -> str:
    """The counts as a few lines for the terminal."""
    counted, moe = count(model), model.moe
    rows: list[tuple[str, float, str]] = [
        ("total", counted.total, ""),
        ("embedding", counted.embedding, ""),
        ("vision", counted.vision, ""),
    ]
    if moe:
        least, most = max(0, moe.top_k - moe.zero_experts), min(moe.top_k, moe.experts)
        layers = f"{counted.experts} in each of {model.backbone.layers} layers"
        rows += [
            ("FFN experts", counted.experts * counted.expert, layers),
            ("MTP", counted.mtp, "not in the total"),
            ("active, least", counted.active(least), f"a token with {least} FFN experts"),
            ("active, mean", counted.active(moe.active_experts), f"{moe.active_experts:g} FFN experts"),
            ("active, most", counted.active(most), f"{most} FFN experts"),
        ]
    else:
        rows.append(("active", counted.active(0), "every text token"))
    return "\n".join(f"{name:14} {value:>19,.0f}  {note}".rstrip() for name, value, note in rows)
