"""Multi-token prediction and the hidden z-loss: what they compute, and that packs and branches stay apart."""

import dataclasses

import pytest
import small
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmoe.layers.mtp import look_ahead
from mmoe.models.multimodal import MultimodalModel, build
from mmoe.recipe.model import MTP
from mmoe.recipe.schema import Recipe

WEIGHT, LAMBDA = 0.3, 0.01


def recipe(mtp: bool = False, hidden_z: float = 0.0) -> Recipe:
    model = small.RECIPE.model
    backbone = dataclasses.replace(model.backbone, hidden_z_coefficient=hidden_z)
    moe = dataclasses.replace(model.moe, balance_coefficient=0.0)
    chosen = MTP(loss_weight=WEIGHT) if mtp else None
    return dataclasses.replace(small.RECIPE, model=dataclasses.replace(model, backbone=backbone, moe=moe, mtp=chosen))


def model_of(chosen: Recipe) -> MultimodalModel:
    small.config()
    return build(chosen).train()


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(4, 64, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def packed(tokens: list[int], **row: list[int]) -> dict:
    return small.batch(torch.tensor([tokens]), **{name: torch.tensor([value]) for name, value in row.items()})


def test_look_ahead_stays_in_its_document_and_branch() -> None:
    """A prefix of two with branches of two and three, another document of three, one place of padding."""
    batch = packed(
        list(range(10, 21)),
        labels=list(range(30, 41)),
        document=[1] * 7 + [2] * 3 + [0],
        branch=[0, 0, 1, 1, 2, 2, 2, 0, 0, 0, 0],
        loss_mask=[0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0],
    )
    ahead = look_ahead(batch)
    assert ahead.follows.int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0]]
    assert ahead.tokens[0, :3].tolist() == [11, 12, 13]
    assert ahead.labels[0, :3].tolist() == [31, 32, 33]
    # A prediction counts where the model's own, one place further, does.
    assert ahead.counts.int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 1, 0, 0, 0]]


def by_hand(model: MultimodalModel, batch: dict) -> Tensor:
    """Mean loss of the token after the next of one plain sequence, as the module's docstring writes it."""
    language, mtp = model.language, model.language.mtp
    assert mtp is not None
    hidden = model.eval().hidden(batch)
    embedded = mtp.embed_tokens.weight[batch["tokens"][0].roll(-1)].unsqueeze(1).clone()
    embedded[-1] = 0
    x = torch.cat((mtp.enorm(embedded), mtp.hnorm(hidden)), -1) @ mtp.eh_proj.weight.t()
    where = language._packed(batch)
    x = x + mtp.attention(mtp.input_layernorm(x), where)
    normed = mtp.post_attention_layernorm(x)
    gate, up = (normed @ mtp.mlp.linear_fc1.weight.t()).chunk(2, -1)
    x = x + (torch.nn.functional.silu(gate) * up) @ mtp.mlp.linear_fc2.weight.t()
    logits = mtp.final_layernorm(x)[:-1, 0] @ language.output_layer.weight.t()
    return cross_entropy(logits, batch["labels"][0, 1:])


def test_loss_and_gradients_are_those_written() -> None:
    """The model's summed loss plus weight · mean · loss tokens, which the global number of loss tokens divides."""
    model = model_of(recipe(mtp=True))
    tokens = torch.tensor([ids(12, 1)])
    batch = small.batch(tokens, labels=tokens.roll(-1, 1))
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(model(batch).sum(), list(parameters.values()))
    loss, count = model.language.take_auxiliary()[1:].tolist()
    assert count == 11

    expected = by_hand(model, batch)
    assert loss / count == pytest.approx(expected.item(), rel=1e-5)
    wanted = torch.autograd.grad(model(batch).sum() + WEIGHT * 12 * expected, list(parameters.values()))
    for name, a, b in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_packed_documents_and_branches_predict_what_they_do_alone() -> None:
    model = model_of(recipe(mtp=True))
    prefix, one, two, other = [1, *ids(4, 1)], ids(4, 2), ids(3, 3), [1, *ids(6, 4)]

    def losses(*parts: tuple[list[int], int, int, int]) -> tuple[float, float]:
        """Of parts (tokens, document, branch, first position) one after another, and two places of padding."""
        tokens = [token for part in parts for token in part[0]]
        fields = {
            "position": [start + i for words, _, _, start in parts for i in range(len(words))],
            "document": [document for words, document, _, _ in parts for _ in words],
            "branch": [branch for words, _, branch, _ in parts for _ in words],
        }
        fields["loss_mask"] = [
            int(branch > 0 or document == 2)
            for branch, document in zip(fields["branch"], fields["document"], strict=True)
        ]
        # A token's label is its successor; the last one of a part carries no loss.
        labels, ends = [*tokens[1:], 0], [sum(len(part[0]) for part in parts[: i + 1]) - 1 for i in range(len(parts))]
        for end in ends:
            fields["loss_mask"][end] = 0
        padded = {name: [*value, 0, 0] for name, value in fields.items()}
        model(packed([*tokens, 0, 0], labels=[*labels, 0, 0], **padded)).sum()
        _, loss, count = model.language.take_auxiliary().tolist()
        return loss, count

    together = losses((prefix, 1, 0, 0), (one, 1, 1, 5), (two, 1, 2, 5), (other, 2, 0, 0))
    apart = [
        losses((prefix, 1, 0, 0), (one, 1, 1, 5)),
        losses((prefix, 1, 0, 0), (two, 1, 2, 5)),
        losses((other, 2, 0, 0)),
    ]
    assert together[1] == sum(count for _, count in apart) == 2 + 1 + 5
    assert together[0] == pytest.approx(sum(loss for loss, _ in apart), rel=1e-5)


def test_hidden_z_loss_is_on_what_enters_the_final_norm() -> None:
    """λ · mean over tokens (log Σ exp|z|)² · loss tokens, without padding, beside the model's loss."""
    plain, penalised = model_of(recipe()), model_of(recipe(hidden_z=LAMBDA))
    tokens = torch.tensor([ids(10, 5)])
    batch = small.batch(tokens, document=torch.tensor([[1] * 8 + [0] * 2]), loss_mask=torch.tensor([[1] * 5 + [0] * 5]))
    seen: list[Tensor] = []
    plain.language.decoder.final_layernorm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss = plain(batch).sum()
    z_loss = LAMBDA * seen[0][:8, 0].abs().logsumexp(-1).square().mean() * 5
    wanted = torch.autograd.grad(loss + z_loss, list(plain.parameters()))
    found = torch.autograd.grad(penalised(batch).sum(), list(penalised.parameters()))
    for name, a, b in zip(dict(plain.named_parameters()), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert penalised.language.take_auxiliary()[0].item() == pytest.approx(z_loss.item(), rel=1e-5)


@torch.no_grad()
def test_logits_do_not_depend_on_them() -> None:
    batch = small.batch(torch.tensor([ids(9, 6)]))
    model = model_of(recipe(mtp=True, hidden_z=LAMBDA)).eval()
    torch.testing.assert_close(model.logits(batch), model_of(recipe()).eval().logits(batch), rtol=0, atol=0)
    assert not model.language.take_auxiliary().any()
