"""The dense language model against transformers' LlamaForCausalLM on the same random weights, and its tied form."""

import dataclasses

import pytest
import small
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmoe.checkpoint.load import weights
from mmoe.convert.families import llama
from mmoe.models.multimodal import MultimodalModel, build
from mmoe.parallel import engine
from mmoe.recipe.model import Llama, Model
from mmoe.recipe.schema import Parallel

SHAPE = Llama(
    type="llama",
    vocab_size=64,
    hidden_size=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=12,
    ffn_hidden_size=48,
    rope_theta=5e5,
    init_std=0.2,
    residual_init_std=0.2,
    embedding_init_std=0.5,
)


def pair(**changes) -> tuple[MultimodalModel, LlamaForCausalLM, Llama]:
    shape = dataclasses.replace(SHAPE, **changes)
    engine.start(Parallel(), seed=0)
    ours = build(dataclasses.replace(small.RECIPE, model=Model(backbone=shape)))
    fields = llama.to_config(shape, "float32")
    theirs = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in fields.items() if k not in ("architectures", "model_type")})
    )
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    state = llama.table(shape).write(weights(ours))
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if shape.tied_embeddings else [], [])
    theirs.tie_weights()
    return ours, theirs, shape


@pytest.mark.parametrize(
    "changes", [{}, {"kv_heads": 4}, {"kv_heads": 1, "head_dim": 8}, {"tied_embeddings": True}], ids=str
)
@pytest.mark.latest
def test_logits_and_gradients(changes):
    ours, theirs, shape = pair(**changes)
    tokens = torch.randint(4, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    batch = small.batch(tokens, labels=tokens.roll(-1, 1))
    expected = theirs(input_ids=tokens).logits
    torch.testing.assert_close(ours.eval().logits(batch), expected, rtol=1e-5, atol=1e-5)

    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    loss.backward()
    ours.train()(batch).sum().backward()
    mine = {name: p.grad for name, p in ours.named_parameters()}
    table = llama.table(shape)
    for name, gradient in table.write(mine).items():
        torch.testing.assert_close(gradient, theirs.get_parameter(name).grad, rtol=1e-4, atol=1e-4, msg=name)


def test_every_tensor_comes_back():
    ours, theirs, shape = pair()
    back = llama.table(shape).read(theirs.state_dict(), "it")
    state = weights(ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert llama.from_config(llama.to_config(shape, "float32"), "it") == dataclasses.replace(
        shape, embedding_init_std=0.02, residual_init_std=0.02
    )
