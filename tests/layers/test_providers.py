"""Which linears, norms and grouped GEMM a recipe comes to, on machines of all kinds; names are the same in all."""

import dataclasses
import sys
import types
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import small
import torch
import upstream
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from mmoe import doctor
from mmoe.errors import UserError
from mmoe.layers import choice, providers
from mmoe.layers.config import make_config
from mmoe.layers.modules import ReplicatedLinear
from mmoe.layers.norms import ApexRMSNorm, RMSNorm
from mmoe.models import multimodal
from mmoe.models.multimodal import MultimodalModel
from mmoe.parallel import engine
from mmoe.recipe.model import Model
from mmoe.recipe.schema import Data, Fp8, Parallel, Precision

pytestmark = pytest.mark.latest

NARROW = dataclasses.replace(small.MIXTURE, expert_hidden_size=24)
# Sizes that Transformer Engine's FP8 takes: 8 + 4 columns of compressed keys and values are too few.
MODEL = Model(backbone=dataclasses.replace(small.BACKBONE, kv_lora_rank=16, qk_rope_head_dim=16), moe=small.MIXTURE)
A100, L40, H100, B200 = (8, 0), (8, 9), (9, 0), (10, 0)


def on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, cuda: str = "13.0") -> None:
    monkeypatch.setattr(choice, "capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def build(precision: Precision) -> MultimodalModel:
    engine.start(Parallel(), 0)
    return multimodal.build(dataclasses.replace(small.RECIPE, model=MODEL, precision=precision))


def loss(network: MultimodalModel) -> torch.Tensor:
    tokens = torch.randint(4, 60, (2, 32), generator=torch.Generator().manual_seed(0))
    return network(small.batch(tokens)).sum()


def shapes(network: MultimodalModel) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def checkpoint_keys(network: MultimodalModel) -> set[str]:
    return {getattr(part, "key", name) for name, part in network.sharded_state_dict().items()}


def test_the_default_is_what_it_was() -> None:
    network = build(Precision())
    layer: Any = network.language.decoder.layers[0]
    attention = layer.attention[0]
    assert type(attention.q_b_proj) is type(layer.mlp[0].linear_fc1) is ColumnParallelLinear
    assert type(attention.o_proj) is type(layer.mlp[0].linear_fc2) is RowParallelLinear
    assert type(attention.q_a_proj) is ReplicatedLinear
    assert type(attention.q_a_layernorm) is type(layer.input_layernorm[0]) is RMSNorm
    assert layer.moe.experts.grouped1 is providers.local_grouped_linear


@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_emulated_fp8_adds_no_parameter(fp8: Fp8) -> None:
    plain, quantised = build(Precision()), build(Precision(fp8=fp8))
    assert shapes(quantised) == shapes(plain)
    extra = checkpoint_keys(quantised) - checkpoint_keys(plain)
    assert bool(extra) == (fp8 == "delayed")
    assert all(key.rpartition(".")[0].endswith(".fp8") for key in extra)


@pytest.mark.parametrize("fp8", ["none", "tensorwise", "delayed"])
def test_transformer_engines_layers_have_our_names_and_arithmetic(monkeypatch: pytest.MonkeyPatch, fp8: Fp8) -> None:
    ours = build(Precision())
    on(monkeypatch, H100)
    seen = upstream.install_transformer_engine(monkeypatch)
    contexts: list[Any] = []
    theirs = build(Precision(provider="transformer_engine", fp8=fp8, fp8_amax_history=7))
    assert shapes(theirs) == shapes(ours)
    states = checkpoint_keys(theirs) ^ checkpoint_keys(ours)
    assert all(key.endswith("_extra_state") for key in states)
    assert bool(states) == (fp8 == "delayed")

    layers = small.BACKBONE.layers
    assert seen.count("TEColumnParallelLinear") == layers * (2 * 2 + 2)
    assert seen.count("TERowParallelLinear") == layers * (2 + 2)
    assert seen.count("TELinear") == layers * 4
    assert seen.count("TENorm") == layers * 4 + 1
    assert seen.count("GroupedLinear") == layers * 2

    monkeypatch.setattr(
        "megatron.core.transformer.transformer_block.get_fp8_context",
        lambda config, layer=-1: contexts.append((config, layer)) or nullcontext(),
    )
    expected, got = loss(ours), loss(theirs)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    expected.backward()
    got.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
    if fp8 == "none":
        assert not contexts
    else:
        config = contexts[0][0]
        assert (config.fp8, config.fp8_recipe, config.fp8_amax_history_len) == ("hybrid", fp8, 7)
        assert config.fp8_amax_compute_algo == "max"
        # Delayed scaling is entered once around all layers, the others around each (transformer_block.py).
        assert [layer for _, layer in contexts] == ([-1] if fp8 == "delayed" else list(range(layers)))
        assert all(size % 16 == 0 for sizes in seen.splits for size in sizes)


def test_auto_takes_transformer_engine_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = Precision(provider="auto")
    assert choice.choose(auto) == choice.Choice(False, False, "none", 'provider = "auto": no CUDA device')
    on(monkeypatch, A100)
    absent = choice.choose(auto)
    assert not absent.transformer_engine
    assert "Transformer Engine is not installed" in absent.why
    upstream.install_transformer_engine(monkeypatch)
    assert choice.choose(auto).transformer_engine
    assert not choice.choose(Precision(provider="local")).transformer_engine


def test_a_transformer_engine_without_its_compiled_part_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare package of that name has the Python files alone."""
    on(monkeypatch, H100)
    upstream.install_transformer_engine(monkeypatch)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    made = choice.choose(Precision(provider="auto"))
    assert not made.transformer_engine
    assert "does not import" in made.why


def test_apexs_norm_is_used_where_there_is_no_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = build(Precision())
    seen = upstream.install_apex(monkeypatch)
    assert not choice.choose(Precision(provider="auto")).apex_norms, "it needs CUDA"
    on(monkeypatch, A100)
    assert not choice.choose(Precision(provider="local")).apex_norms
    theirs = build(Precision(provider="auto"))
    norms = [module for module in theirs.modules() if isinstance(module, RMSNorm)]
    assert norms
    assert all(type(norm) is ApexRMSNorm for norm in norms)
    assert shapes(theirs) == shapes(ours)
    torch.testing.assert_close(loss(theirs), loss(ours), rtol=0, atol=0)
    assert seen.count("fused_rms_norm_affine") == len(norms)


def test_what_pypi_calls_apex_is_not_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream.install_apex(monkeypatch)
    assert choice.apex_missing() == ""
    other = types.ModuleType("apex")
    other.__spec__ = sys.modules["apex"].__spec__
    other.__path__ = []
    monkeypatch.setitem(sys.modules, "apex", other)
    monkeypatch.delitem(sys.modules, "apex.optimizers")
    assert choice.apex_missing() == "apex.optimizers is not installed"


@pytest.mark.parametrize(
    ("capability", "cuda", "allowed"),
    [
        (None, "13.0", {"delayed", "tensorwise", "blockwise", "mxfp8"}),
        (A100, "13.0", set()),
        (L40, "13.0", {"delayed", "tensorwise"}),
        (H100, "12.8", {"delayed", "tensorwise"}),
        (H100, "12.9", {"delayed", "tensorwise", "blockwise"}),
        (B200, "13.0", {"delayed", "tensorwise", "mxfp8"}),
        ((12, 0), "13.0", {"delayed", "tensorwise"}),
    ],
)
def test_fp8_is_refused_where_the_hardware_has_none(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, cuda: str, allowed: set[str]
) -> None:
    on(monkeypatch, capability, cuda)
    upstream.install_transformer_engine(monkeypatch)
    for recipe in choice.FP8_CAPABILITY:
        if recipe in allowed:
            assert choice.choose(Precision(provider="auto", fp8=recipe)).emulates == (capability is None)
        else:
            with pytest.raises(UserError, match=f'FP8 on CUDA: {recipe} needs .*precision.fp8 = "{recipe}"'):
                choice.choose(Precision(provider="auto", fp8=recipe))


Provider = Literal["auto", "local", "transformer_engine"]


@pytest.mark.parametrize(
    ("provider", "capability", "installed", "fp8", "what"),
    [
        ("transformer_engine", None, True, "none", "cannot be used: no CUDA device"),
        ("transformer_engine", H100, False, "none", "cannot be used: Transformer Engine is not installed"),
        ("auto", H100, False, "delayed", "FP8 on CUDA: Transformer Engine is not installed"),
        ("local", H100, True, "delayed", "FP8 on CUDA: the provider is our own"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    provider: Provider,
    capability: tuple[int, int] | None,
    installed: bool,
    fp8: Fp8,
    what: str,
) -> None:
    on(monkeypatch, capability)
    if installed:
        upstream.install_transformer_engine(monkeypatch)
    with pytest.raises(UserError, match=what):
        choice.choose(Precision(provider=provider, fp8=fp8))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data": Data(mixture="none", sequence_length=36)}, "takes multiples of 16, not 72.*sequence_length"),
        (
            {"model": dataclasses.replace(MODEL, moe=dataclasses.replace(small.MIXTURE, expert_hidden_size=24))},
            "not 24",
        ),
        ({"parallel": Parallel(recompute="selective")}, "selective recompute"),
    ],
)
def test_what_transformer_engines_fp8_cannot_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], what: str
) -> None:
    on(monkeypatch, H100)
    upstream.install_transformer_engine(monkeypatch)
    precision = Precision(provider="auto", fp8="delayed")
    recipe = dataclasses.replace(small.RECIPE, model=MODEL, precision=precision)
    make_config(recipe)
    with pytest.raises(UserError, match=what):
        make_config(dataclasses.replace(recipe, **changes))


def test_doctor_says_what_was_chosen_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dict(doctor._precision())
    assert rows["linears"] == 'Megatron-Core\'s (provider = "auto": no CUDA device)'
    assert rows["FP8 delayed"] == rows["FP8 mxfp8"] == "emulated on the CPU"
    assert rows["optimizer"].endswith("AdamW")
    on(monkeypatch, A100)
    upstream.install_transformer_engine(monkeypatch)
    rows = dict(doctor._precision())
    assert rows["linears"].startswith("Transformer Engine's")
    assert rows["grouped GEMM"] == "Transformer Engine's"
    assert "needs compute capability 8.9, this GPU has 8.0" in rows["FP8 tensorwise"]
