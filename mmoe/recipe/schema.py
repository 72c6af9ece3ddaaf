"""What a recipe may say: every key, its type, its default and its unit.

A recipe is a TOML file with the tables below. Loading is strict (:mod:`mmoe.recipe.load`): an unknown key, a
wrong type or an impossible value is an error that names the key.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A LongCat-Flash shaped language model: ``layers`` ScMoE layers, each with two MLA and two dense FFN blocks."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
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
    """A vision encoder; ``type`` decides which of the sizes it reads."""

    name: str
    type: Literal["vit", "convnet"]
    image_size: int
    patch_size: int = 8
    width: int = 64
    layers: int = 2
    heads: int = 4
    widths: tuple[int, ...] = (16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Connector:
    """Spatial Vision Aggregator (Cambrian-1, arXiv 2406.16860): ``grid``² queries over the grids of all encoders."""

    type: Literal["sva"] = "sva"
    grid: int
    width: int
    heads: int
    layers: int = 1


@dataclass(frozen=True, kw_only=True)
class Model:
    backbone: Backbone
    moe: MoE
    mtp: MTP | None = None
    encoders: tuple[Encoder, ...] = ()
    connector: Connector | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    mixture: str
    """A shipped mixture's name or the path of a mixture's .toml."""
    root: str = "data-cache"
    """Folder that holds the prepared data sets and the tokenizer."""
    tokenizer: str = "tokenizer.json"
    """Path, relative to ``root``."""
    sequence_length: int = 1024
    """Tokens in a pack."""
    images_per_pack: int = 16
    max_pixels: int = 64_000_000
    """An image whose header announces more pixels is a bad sample."""
    max_bad_in_a_row: int = 100
    workers: int = 1
    """DALI decoding threads."""
    prefetch: int = 2
    """Micro-batches decoded ahead."""


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int
    global_batch: int
    """Packs per optimizer step, over all ranks."""
    micro_batch: int
    """Packs per forward pass on one rank."""
    seed: int = 0
    max_skipped_in_a_row: int = 10
    """Steps skipped for a loss that is not finite, one after another, before the run stops."""
    log_every: int = 10
    stall_warning_seconds: float = 30.0
    """Seconds a rank waits in one collective before the watchdog names it and the ranks that hold it up."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Learning rate and initialisation carried over from a narrow proxy (arXiv 2509.01322).

    The rates and spreads in the recipe are the proxy's; :mod:`mmoe.layers.roles` says what becomes of each.
    """

    base_width: int
    """Hidden size of the proxy that they were tuned at; 768 in the report."""


Fp8 = Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations."""
    provider: Literal["auto", "local", "transformer_engine"] = "local"
    """Whose linears, norms and grouped GEMM the language model has. "auto": Transformer Engine's on CUDA where it is
    installed, else ours, there with apex's norm if that is."""
    fp8: Fp8 = "none"
    """Scaling recipe of the linears' three GEMMs in FP8, E4M3 forward and E5M2 for gradients; emulated on the CPU."""
    fp8_amax_history: int = 1024
    """Steps whose largest magnitude sets a scale of "delayed"."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Sizes of the parallel groups; what is left over is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    sequence: bool = False
    """Sequence parallelism: what the tensor-parallel ranks would hold alike is cut along the sequence."""
    distributed_optimizer: bool = False
    """Each data-parallel rank keeps a part of the optimizer's state."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward: none, the attention blocks', or all but the layers' inputs."""
    overlap_moe: bool = True
    """Dispatch and combine run beside the dense branch of a layer (ScMoE)."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: int = 1000
    """Steps between two checkpoints; the last step always has one."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written, from a copy of the state in host memory."""
    keep_last: int = 0
    """How many of the newest checkpoints stay; 0: all."""
    keep_every: int = 0
    """Checkpoints at multiples of so many steps stay, however old; 0: none. Only where ``keep_last`` deletes any."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    description: str = ""
    model: Model
    data: Data
    train: Train
    optimizer: Optimizer
    transfer: Transfer | None = None
    precision: Precision = field(default_factory=Precision)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
