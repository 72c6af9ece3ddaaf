"""What the ranks of a pool run in FP8: the parallel linears by themselves, and a few steps with delayed scales."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import float64
import torch
import training
from torch import Tensor

from mmoe.layers import fp8, providers
from mmoe.layers.config import make_config
from mmoe.models.multimodal import build_stages
from mmoe.parallel import engine, state
from mmoe.recipe.schema import Fp8, Precision, Recipe
from mmoe.train.step import Stepper

# isort: split
import jobs  # it imports Megatron-Core, which has to find torch prepared

TOKENS, INPUTS, OUTPUTS = 16, 24, 40


def recipe(name: Fp8, **parallel: Any) -> Recipe:
    precision = Precision(fp8=name, fp8_amax_history=2)
    return dataclasses.replace(jobs.recipe(**parallel), precision=precision)


def _numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _alone(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of one rank's GEMMs by themselves."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = fp8.linear(x, weight, fp8.make_scaling("tensorwise", 1), "mlp")
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def linears(sequence: bool) -> dict[str, tuple[Tensor | None, Tensor]]:
    """What a column- and a row-parallel linear gave on this rank, and the same of its slices' GEMMs by themselves; the
    gathers, scatters and sums around them are Megatron's."""
    found: dict[str, tuple[Tensor | None, Tensor]] = {}
    settings = recipe("tensorwise", tensor=2, sequence=sequence)
    here = engine.start(settings.parallel, 0)
    config, rank = make_config(settings), here.tensor_rank
    tokens = torch.arange(TOKENS).chunk(2)[rank] if sequence else torch.arange(TOKENS)
    x, w, dy = (
        _numbers(TOKENS, 1, INPUTS, seed=1),
        _numbers(OUTPUTS, INPUTS, seed=2),
        _numbers(TOKENS, 1, OUTPUTS, seed=3),
    )

    column = providers.column(config, INPUTS, OUTPUTS, "mlp")
    column.weight.data.copy_(w.chunk(2)[rank])
    mine = x[tokens].clone().requires_grad_()
    y = column(mine)[0]
    y.backward(dy.chunk(2, -1)[rank])
    parts = [_alone(x, wi, dyi) for wi, dyi in zip(w.chunk(2), dy.chunk(2, -1), strict=True)]
    found["column y"] = y.detach(), parts[rank][0]
    found["column dx"] = mine.grad, (parts[0][1] + parts[1][1])[tokens]
    found["column dw"] = column.weight.grad, parts[rank][2]

    row = providers.row(config, INPUTS, OUTPUTS, "mlp")
    row.weight.data.copy_(w.chunk(2, 1)[rank])
    mine = x.chunk(2, -1)[rank].clone().requires_grad_()
    y = row(mine)[0]
    y.backward(dy[tokens])
    parts = [_alone(xi, wi, dy) for xi, wi in zip(x.chunk(2, -1), w.chunk(2, 1), strict=True)]
    found["row y"] = y.detach(), (parts[0][0] + parts[1][0])[tokens]
    found["row dx"] = mine.grad, parts[rank][1]
    found["row dw"] = row.weight.grad, parts[rank][2]
    return found


def train(
    saved: str = "", resumed: str = "", wide: bool = False, **parallel: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of two steps, and the delayed scales after the first, an expert's by its number over all ranks.

    Writes a checkpoint after that step, or begins with the one at ``resumed``. ``wide``: all but FP8 is fp64, which
    Megatron-Core does not clip gradients of.
    """
    settings = recipe("delayed", **parallel)
    if wide:
        settings = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, clip_grad=0.0))
    with float64.instead_of_float32() if wide else contextlib.nullcontext():
        here = engine.start(settings.parallel, 0)
        torch.use_deterministic_algorithms(True)
        models = build_stages(settings)
        stepper = Stepper(settings, float64.convert(models) if wide else models)
        if resumed:
            state.load(Path(resumed), stepper.wrapped, stepper.optimizer)

        def loss(step: int) -> float:
            batches = jobs.batches(step)
            return stepper.step(iter(map(float64.convert_batch, batches) if wide else batches), 1e-3).loss

        losses = [loss(int(bool(resumed)))]
        if saved:
            training.save_state(Path(saved), stepper)
        scales = {}
        for name, tensor in stepper.models[0].state_dict().items():
            if name.endswith("fp8.scale"):
                experts = tensor if ".experts." in name else [tensor]
                for index, scale in enumerate(experts, start=here.expert_rank * len(experts)):
                    scales[f"{name} {index}" if ".experts." in name else name] = scale.clone()
        if not resumed:
            losses.append(loss(1))
        return losses, scales
