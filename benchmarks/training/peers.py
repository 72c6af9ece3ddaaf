"""The same step as others take it: transformers' LongCat-Flash, and a GPT of Megatron-Core's own local layers."""

import importlib
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks.training import flops, parts_of
from benchmarks.training.ours import Ours
from mmoe.convert.families import longcat
from mmoe.layers.router import CONTROLLER_STATE
from mmoe.parallel import engine, optimizer
from mmoe.recipe.model import Longcat
from mmoe.recipe.schema import Recipe


class Transformers:
    """``LongcatFlashForCausalLM`` with our weights and biases, ``torch.optim.AdamW`` as a user would make it.

    In bfloat16 its optimizer keeps moments in bfloat16 and no main weights, which is less work than ours does.
    """

    def __init__(self, ours: Ours) -> None:
        from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

        shape, moe = parts_of(ours.recipe.model)
        fields = longcat.to_config(shape, moe, "float32")
        self.model: Any = LongcatFlashForCausalLM(LongcatFlashConfig(**fields))
        state = {
            name: value
            for name, value in ours.model.state_dict().items()
            if torch.is_tensor(value) and not name.endswith(CONTROLLER_STATE)
        }
        table = longcat.table(shape, moe, fused=True)
        self.model.load_state_dict(table.write({name: value.float() for name, value in state.items()}))
        router = {name: value.clone() for name, value in self.model.state_dict().items() if ".mlp.router." in name}
        self.model.to(ours.model.config.params_dtype)
        for name, value in router.items():
            owner, _, last = name.rpartition(".")
            getattr(self.model.get_submodule(owner), last).data = value
        settings = ours.recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        self.tokens, self.labels = ours.batch["tokens"], ours.batch["labels"]

    def loss(self) -> Tensor:
        logits = self.model(input_ids=self.tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), self.labels.flatten())

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def head_width(shape: Longcat) -> int:
    """Of a plain attention with as many weights (4 D H w) as one MLA; even, for the rotary pairs."""
    return max(2, 2 * round(flops.attention_weights(shape) / (8 * shape.hidden_size * shape.heads)))


class Megatron:
    """A GPT with as many layers of attention, dense FFN and K_e FFN experts of N as the model measured, without MLA.

    For each ScMoE layer: one layer with a dense FFN, and one with experts beside a shared expert as wide as the dense
    FFN. Its plain attention has as wide heads as make its active weights those of the model. Experts are
    Megatron-Core's SequentialMLP, attention its DotProductAttention, the dispatcher the one for all-gather, which for
    one rank is the shortest; ``balanced`` is its own forced balance (random logits).
    """

    def __init__(self, settings: Recipe, data: dict[str, Any], *, balanced: bool) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Apex is not installed")
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
            from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.transformer.module import Float16Module

        moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        if not hasattr(moe_utils, "te_general_gemm"):
            # 0.16.1, moe_utils.py:1192: a NameError without Transformer Engine.
            moe_utils.te_general_gemm = None
        engine.start(settings.parallel, settings.train.seed)
        shape, moe = parts_of(settings.model)
        self.active = round(moe.active_experts)
        dtype = torch.bfloat16 if settings.precision.dtype == "bf16" else torch.float32
        config = engine.TransformerConfig(
            num_layers=2 * shape.layers,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.heads,
            kv_channels=head_width(shape),
            ffn_hidden_size=shape.ffn_hidden_size,
            num_moe_experts=moe.experts,
            moe_ffn_hidden_size=moe.expert_hidden_size,
            moe_layer_freq=[0, 1] * shape.layers,
            moe_shared_expert_intermediate_size=shape.ffn_hidden_size,
            moe_router_topk=self.active,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="none",
            moe_router_force_load_balancing=balanced,
            moe_token_dispatcher_type="allgather",
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            use_cpu_initialization=True,
            calculate_per_token_loss=True,
            **engine.version_settings(),
        )
        spec: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        model: Any = GPTModel(
            config,
            spec,
            shape.vocab_size,
            settings.data.sequence_length,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
        self.weights = self._active_weights(model, moe.experts)
        if config.bf16:
            model = Float16Module(config, model)
        self.settings, self.data = settings, data
        self.wrapped = engine.prepare([model], config, distributed_optimizer=False)
        self.optimizer = optimizer.build(settings.optimizer, self.wrapped, config, distributed=False)
        s = settings.data.sequence_length
        self.mask = torch.ones(s, s, dtype=torch.bool).triu(1).view(1, 1, s, s)

    def _active_weights(self, model: torch.nn.Module, experts: int) -> float:
        """As :func:`benchmarks.training.flops.active_weights` counts them."""
        total = 0.0
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embedding" not in name:
                total += parameter.numel() * (
                    self.active / experts if ".experts." in name and "shared" not in name else 1
                )
        return total

    def _forward(self, batches: Any, model: Any) -> Any:
        data = next(batches)

        def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int), losses.detach().float().mean()

        return model(data["tokens"], data["position"], self.mask, labels=data["labels"]), loss

    def step(self) -> float:
        records = engine.forward_backward(
            self.wrapped,
            self.optimizer,
            self._forward,
            itertools.repeat(self.data, 1),
            1,
            self.settings.data.sequence_length,
            self.settings.train.micro_batch,
        )
        optimizer.update(self.optimizer, self.settings.optimizer.lr)
        return float(records[0])
