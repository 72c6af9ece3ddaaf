"""The tables of a recipe that say what the model is; an exported model ships this file."""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What every language model has; ``type`` names which one it is."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    ffn_hidden_size: int
    max_position: int = 4096
    rope_theta: float = 1e7
    norm_eps: float = 1e-5
    init_std: float = 0.02
    embedding_init_std: float = 0.02
    residual_init_std: float = 0.02
    """Of the projections that write into the residual stream."""
    hidden_z_coefficient: float = 0.0
    """λ of the hidden z-loss λ · mean (log Σ exp|z|)² on what enters the final norm; about 1e-7 where wanted."""


@dataclass(frozen=True, kw_only=True)
class Longcat(Backbone):
    """A LongCat-Flash shaped language model: ``layers`` ScMoE layers, each with two MLA and two dense FFN blocks."""

    type: Literal["longcat"] = "longcat"
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class Llama(Backbone):
    """A Llama-shaped dense language model: grouped-query attention, SwiGLU, RMSNorm, rotary positions."""

    type: Literal["llama"]
    kv_heads: int
    """Heads of keys and values, each shared by ``heads / kv_heads`` heads of queries."""
    head_dim: int
    tied_embeddings: bool = False
    """The output layer is the embedding."""


AnyBackbone = Longcat | Llama


@dataclass(frozen=True, kw_only=True)
class MoE:
    """Zero-computation-expert routing (LongCat-Flash, arXiv 2509.01322, sections 2.1 and 3.1)."""

    experts: int
    zero_experts: int
    top_k: int
    expert_hidden_size: int
    routed_scaling_factor: float = 1.0
    variance_factor: float = 1.0
    """γ: factor on the layer's output for experts cut into m finer ones each, γ = m: gates are m times
    smaller on average, as is the variance that m times narrower experts add up. The released models have no field for
    it, their routed_scaling_factor of 6 multiplies the same sum: both factors count, and an export has their product.
    """
    identity: Literal["scaled", "unscaled", "copy", "drop"] = "scaled"
    """Weight of x in a zero expert's slot: its score × both factors (the released models), its score, 1, or 0."""
    active_experts: float
    """K_e: the wanted mean number of FFN experts per token; the controller steers towards it."""
    bias_rate: float = 1e-3
    """μ of the bias controller, per optimizer step."""
    bias_rate_min: float | None = None
    """Where μ has decayed to at the last step, by half a cosine; without it μ stays."""
    bias_integral_gain: float = 0.0
    """Of the controller's summed error, beside 1 for its error; 0 is the published rule."""
    bias_integral_limit: float = 10.0
    """Bound of the summed error (anti-windup), in an expert's wanted shares of the selections."""
    bias_derivative_gain: float = 0.0
    """Of the error's change since the step before; 0 is the published rule."""
    balance_coefficient: float = 0.0
    """α of the device-level balance loss."""
    balance_groups: int = 1
    """D: groups of FFN experts in the balance loss; the zero experts are one more group."""
    router_init_std: float = 0.02
    order: Literal["shortcut", "sequential"] = "shortcut"
    """What the experts of a layer read: its first attention's output, on a shortcut around the rest (ScMoE), or its
    second attention's, in the place of an ordinary MoE layer. Parameters and arithmetic are as many; only on the
    shortcut is there something to communicate beside (``parallel.overlap_moe`` hides nothing in the other)."""


@dataclass(frozen=True, kw_only=True)
class MTP:
    """Multi-token prediction by one dense layer (arXiv 2509.01322; arXiv 2412.19437, section 2.2)."""

    loss_weight: float = 0.1
    """Of the loss on the token after the next, a mean over the tokens that have one, beside the model's own loss."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What every vision encoder has; ``type`` names which one it is."""

    name: str
    image_size: int
    """Side of the square that images are resized to for it, pixels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    """It reads (x/255 − mean) / std, a channel each (RGB)."""
    grid: int | None = None
    """Side of its feature map behind the encoder: bilinear, as the released Cambrian-1 does. None: as it comes."""


@dataclass(frozen=True, kw_only=True)
class ViT(Encoder):
    """A vision transformer. The defaults are a plain one; CLIP, SigLIP, DINOv2 and DINOv3 differ in what is named here
    (docs/systems/encoders.md has each one's settings)."""

    type: Literal["vit"]
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int | None = None
    """None: 4 · width."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu"
    """swiglu: silu(gate) · up, in the place of an activated layer. quick_gelu: x · sigmoid(1.702 x)."""
    position: Literal["learned", "rope"] = "learned"
    """rope: of the patches' centres in two axes (DINOv3)."""
    rope_theta: float = 100.0
    class_token: bool = False
    registers: int = 0
    """Tokens of no place beside the class token (arXiv 2309.16588)."""
    mask_token: bool = False
    """Of masked image modelling: kept, and not used here."""
    pre_norm: bool = False
    """A LayerNorm before the first block (CLIP)."""
    layer_scale: bool = False
    """A learned factor a channel on what each branch adds (DINO)."""
    patch_bias: bool = True
    query_value_bias: bool = True
    key_bias: bool = True
    drop_border: bool = False
    """The last image_size % patch_size rows and columns of pixels are not read (SigLIP's 384 with patches of 14)."""
    norm_eps: float = 1e-5
    feature_layer: int = -1
    """Behind which block the features are taken: −1 the last, −2 the one before (LLaVA)."""
    final_norm: bool = True
    """The features go through the last LayerNorm. CLIP has one that only its class token goes through."""
    pooling: Literal["none", "norm", "attention"] = "none"
    """What there is behind the features, kept and not used here: CLIP's norm, SigLIP's attention head."""


@dataclass(frozen=True, kw_only=True)
class ConvNeXt(Encoder):
    """ConvNeXt (arXiv 2201.03545)."""

    type: Literal["convnext"]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    """Blocks in each stage. The first stage halves the image twice, every further one once."""
    patch_size: int = 4
    feature_stages: tuple[int, ...] = (-1,)
    """The stages whose maps are the features, one after another along the channels; several need ``grid``."""
    layer_scale: bool = True
    norm_eps: float = 1e-6
    pooling: Literal["none", "norm"] = "none"
    """The LayerNorm of the pooled map, kept and not used here."""
    pooled_norm_eps: float = 1e-6
    """Of that LayerNorm."""


@dataclass(frozen=True, kw_only=True)
class ConvNet(Encoder):
    """A small convolutional network with GroupNorm, to train from scratch."""

    type: Literal["convnet"]
    widths: tuple[int, ...]
    """Of the stages, each of which halves the image."""


AnyEncoder = ViT | ConvNeXt | ConvNet


@dataclass(frozen=True, kw_only=True)
class Connector:
    """What makes image tokens of the encoders' features; ``type`` names which one it is."""

    grid: int
    """Side of the square of tokens that an image becomes."""
    newline: bool = False
    """One learned token ends each row (Cambrian-1)."""

    @property
    def tokens(self) -> int:
        """Of one image."""
        return self.grid * (self.grid + self.newline)


@dataclass(frozen=True, kw_only=True)
class Linear(Connector):
    """One linear map (LLaVA); features of several encoders are put together along the channels."""

    type: Literal["linear"]


@dataclass(frozen=True, kw_only=True)
class MLP(Connector):
    """Linear maps with GELU between them (LLaVA-1.5), each followed by a LayerNorm with ``norm`` (Yi-VL)."""

    type: Literal["mlp"]
    layers: int = 2
    norm: bool = False


@dataclass(frozen=True, kw_only=True)
class Inside:
    """SVA layers within the language model, behind its layers start, start + stride, … (counted from 0)."""

    start: int = 0
    stride: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class SVA(Connector):
    """Spatial Vision Aggregator (Cambrian-1, arXiv 2406.16860): queries over the grids of all encoders."""

    type: Literal["sva"] = "sva"
    width: int
    heads: int
    layers: int = 1
    """D."""
    groups: tuple[int, ...] = ()
    """Side of each group's square of queries, of which there are G, each with layers of its own: they are resized to
    ``grid`` and put together along the channels. None: one group of ``grid``."""
    mixing: Literal["joint", "sep"] = "joint"
    """joint: one softmax over the keys of all encoders. sep: one attention an encoder (one that has a single key for
    each query goes through an MLP), weighted by a softmax over the encoders."""
    scale: Literal["head", "width"] = "head"
    """Of the scores: 1/√(width / heads), the released code's, or 1/√width, which the paper prints."""
    mask_padding: bool = False
    """Keys in the padding of images that were padded to a square (``data.fit = "pad"``) are left out."""
    inside: Inside | None = None

    @property
    def sides(self) -> tuple[int, ...]:
        return self.groups or (self.grid,)


AnyConnector = SVA | MLP | Linear


@dataclass(frozen=True, kw_only=True)
class Special:
    """Numbers of the special tokens in the tokenizer; the defaults are those of `mmoe data prepare`'s own."""

    pad: int = 0
    """What an export pads shorter texts with, and what fills the place of a sample that cannot be read."""
    bos: int = 1
    """Begins every document."""
    eos: int = 2
    """Ends every answer."""
    image: int = 3
    """Stands where the connector's rows go. A special token, or the first number behind the tokenizer's last: nothing
    that a text is read as. Its own embedding is not used, but has to be there."""


@dataclass(frozen=True, kw_only=True)
class Model:
    backbone: AnyBackbone
    special: Special = field(default_factory=Special)
    moe: MoE | None = None
    """Of a LongCat backbone."""
    mtp: MTP | None = None
    encoders: tuple[AnyEncoder, ...] = ()
    connector: AnyConnector | None = None

    @property
    def image_tokens(self) -> int:
        """Of one image; 0 for a model of text alone."""
        return self.connector.tokens if self.connector else 0

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Sides that an image is resized to for the encoders, pixels, each once."""
        return self.sizes_of(without=())

    def sizes_of(self, *, without: Container[str]) -> tuple[int, ...]:
        """:attr:`image_sizes` of the encoders whose name is not among ``without``."""
        return tuple(dict.fromkeys(encoder.image_size for encoder in self.encoders if encoder.name not in without))
