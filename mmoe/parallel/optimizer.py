"""AdamW over the ranks: Megatron-Core's optimizers, where a step is taken or left out on all ranks alike."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmoe.parallel.engine import DistributedDataParallel, TransformerConfig
from mmoe.recipe.schema import Optimizer

# isort: split
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import ParamGroupOverride


def build(
    settings: Optimizer,
    models: Sequence[DistributedDataParallel],
    config: TransformerConfig,
    *,
    distributed: bool,
    lr_multiplier: Callable[[str], float] = lambda name: 1.0,
) -> MegatronOptimizer:
    """AdamW on fp32 main weights with clipping by the global norm; apex's or TE's fused Adam where installed.

    Norms, biases and everything else with one dimension take no weight decay. ``lr_multiplier`` gives the factor on the
    learning rate for a parameter's name in the model.
    """
    adam = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=config.params_dtype == torch.bfloat16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(
        adam, list(models), {**get_standard_config_overrides(adam), **_rates(models, lr_multiplier)}
    )
    config.grad_scale_func = optimizer.scale_loss
    for group in optimizer.param_groups:
        # Upstream only its own scheduler (optimizer_param_scheduler.py) turns the multiplier into the group's decay.
        group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)
    for part in parts(optimizer):
        mended = {Float16OptimizerWithFloat16Params: MixedDtypeOptimizer, DistributedOptimizer: ShardedOptimizer}
        part.__class__ = mended.get(type(part), type(part))
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False  # one pass over a parameter, on the CPU too
    begin_state(optimizer)
    return optimizer


def _rates(
    models: Sequence[DistributedDataParallel], lr_multiplier: Callable[[str], float]
) -> dict[ParamKey, ParamGroupOverride]:
    """Upstream's description of the groups of parameters whose multiplier is not 1."""

    def factor_of(wrapped_name: str) -> float:
        return lr_multiplier(wrapped_name.removeprefix("module."))

    def group(factor: float) -> ParamKey:
        has_factor = ParamWithNamePredicate(f"lr_mult {factor:g}", lambda _, name: factor_of(name) == factor)
        return ParamKey(with_name_predicate=has_factor)

    factors = {factor_of(name) for model in models for name, _ in model.named_parameters()} - {1.0}
    return {group(factor): {"lr_mult": factor} for factor in sorted(factors)}  # type: ignore[misc]


def adam() -> type:
    """The AdamW in use: Transformer Engine's FusedAdam, else apex's, else torch's, as Megatron-Core found them when it
    was imported (optimizer/__init__.py)."""
    return megatron_optimizer.Adam


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers of dense and of expert parameters that a chained optimizer is made of."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def update(optimizer: MegatronOptimizer, rate: float) -> tuple[bool, float]:
    """Clips the reduced gradients by their global norm and steps with learning rate ``rate``.

    Returns whether the step was taken, and the norm before clipping. Where the norm is not finite, on all ranks alike,
    weights and state stay as they were. Upstream's ``step`` is the same without a look at the norm.
    """
    found_inf = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if found_inf or not math.isfinite(norm):
        return False, norm
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
    for part in parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    return bool(optimizer.step_with_ready_grads()), norm


def begin_state(optimizer: MegatronOptimizer) -> None:
    """Gives torch's AdamW the state that it would make at its first step: a checkpoint before that is whole."""
    for part in parts(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            part.init_state_fn(part.optimizer, part.config)
            for parameter, state in part.optimizer.state.items():
                state.setdefault("step", torch.zeros((), device=parameter.device))


def adam_state(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """What the optimizer keeps for a parameter of the model, on a single process: Adam's moments and step, and as
    ``param`` the weight that it works on."""
    for part in parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            if parameter in part.model_param_group_index_map:
                return part._get_main_param_and_optimizer_states(parameter)
            continue
        main = getattr(parameter, "main_param", parameter)
        if main in part.optimizer.state:
            return {**part.optimizer.state[main], "param": main}
    raise KeyError("the optimizer does not know this parameter")


class ShardedOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer, with torch's AdamW below it where no fused one is installed."""

    taken = 0
    """Steps of this optimizer, which one without parameters does not count."""

    def step_with_ready_grads(self) -> bool:
        self.taken += 1
        return super().step_with_ready_grads()

    def _set_main_param_and_optimizer_states(self, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Upstream (distrib_optimizer.py:940) asks the checkpoint for ``step``, which it keeps elsewhere."""
        group, place = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        super()._set_main_param_and_optimizer_states(model_param, {"step": state.get("step"), **tensors})

    def state_dict(self) -> dict[str, Any]:
        """Upstream (distrib_optimizer.py:639) reads the step off its parameters: a rank whose part of the model is
        frozen has none."""
        if self.optimizer.state:
            return super().state_dict()
        state = self.optimizer.state_dict()
        for group in state["param_groups"]:
            del group["params"]
            group["step"] = float(self.taken)
        return {"optimizer": {"param_groups": state["param_groups"]}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Upstream (distrib_optimizer.py:818) gives every parameter one and the same ``step``: each of them would count
        it up, and a run that goes on would drift."""
        super().load_state_dict(state_dict)
        self.taken = int(state_dict["optimizer"]["param_groups"][0]["step"])
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


class MixedDtypeOptimizer(Float16OptimizerWithFloat16Params):
    """bf16 parameters with fp32 main weights, beside parameters that are fp32 themselves (the routers)."""

    def sharded_state_dict(
        self, model_sharded_state_dict: dict, is_loading: bool = False, metadata: dict | None = None
    ) -> dict:
        """Upstream's (optimizer.py:800) numbers the bf16 parameters alone: every id behind a router is wrong."""
        state = self.state_dict()
        model_of = {
            id(main): model
            for models, mains in zip(self.float16_groups, self.fp32_from_float16_groups, strict=True)
            for model, main in zip(models, mains, strict=True)
        }
        groups = [group["params"] for group in self.optimizer.param_groups]
        in_order = [model_of.get(id(parameter), parameter) for group in groups for parameter in group]
        shards: Any = get_param_id_to_sharded_param_map(model_sharded_state_dict, in_order)
        saved = state["optimizer"]
        main_ids = [
            [number for number, parameter in zip(table["params"], group, strict=True) if id(parameter) in model_of]
            for table, group in zip(saved["param_groups"], groups, strict=True)
        ]
        state["fp32_from_fp16_params"] = [
            [
                make_sharded_optimizer_tensor(shards[number], main, prefix="optimizer.state.fp32_param")
                for number, main in zip(numbers, mains, strict=True)
            ]
            for numbers, mains in zip(main_ids, state["fp32_from_fp16_params"], strict=True)
        ]
        step = self._extract_common_per_param_step(saved)
        optim_state_to_sharding_state(saved, shards, exclude_keys=("step",))
        if step:
            saved["state"]["common_step"] = step
        return state
