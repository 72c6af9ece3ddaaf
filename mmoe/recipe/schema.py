"""What a recipe may say: every key, its type, its default and its unit.

A recipe is a TOML file with the tables below. Loading is strict (:mod:`mmoe.recipe.load`): an unknown key, a
wrong type or an impossible value is an error that names the key.
"""

from dataclasses import dataclass, field
from typing import Literal

from mmoe.recipe.model import Model


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
    fit: Literal["stretch", "pad", "crop"] = "stretch"
    """How an image becomes a square: both sides resized; a gray border first (LLaVA-1.5, Cambrian-1); the shorter side
    resized and the middle cut out (CLIP)."""
    interpolation: Literal["triangular", "cubic"] = "triangular"
    """The filter of the resize, both antialiased; cubic is CLIP's."""
    decoder: Literal["dali", "simplejpeg", "pillow"] = "dali"
    """What decodes and resizes: DALI, on a GPU too; libjpeg-turbo (`pip install simplejpeg`), the fastest on a CPU; or
    Pillow, which is the definition."""
    features: str = ""
    """Folder of frozen encoders' features that `mmoe data encode` has made: those are read in the place of images."""
    workers: int = 1
    """Decoding threads."""
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
    frozen: tuple[str, ...] = ()
    """Modules whose weights stay as they are, with all that is in them: "encoders", "encoders.clip", "connector",
    "language", … They take no memory for gradients and optimizer, and auxiliary losses that are for them give no
    gradient to others: balance and hidden z-loss are recorded all the same, multi-token prediction does not run."""
    stall_warning_seconds: float = 30.0
    """Seconds a rank waits in one collective before the watchdog names it and the ranks that hold it up."""


@dataclass(frozen=True, kw_only=True)
class ModuleRate:
    """A learning rate of its own, which follows the same schedule."""

    name: str
    """Of a module, as in ``train.frozen``; of several that hold a parameter the longest name counts."""
    lr: float


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    modules: tuple[ModuleRate, ...] = ()
    reference_batch: int | None = None
    """The ``train.global_batch`` that the rates are for: at another one ``lr``, ``min_lr`` and those of ``modules`` are
    multiplied by √(global_batch / reference_batch) (Cambrian-1, arXiv 2406.16860). None: rates stay as they are."""


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
    stages: tuple["Recipe", ...] = ()
    """Trained one after another, each from the weights of the one before. In the file a ``[[stages]]`` table has a
    ``name`` and the keys that differ from the tables outside of it; an entry of a list of tables goes by its name."""
