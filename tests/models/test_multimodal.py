"""Packs, branches and images do not see each other: a packed document gives the logits that it gives alone."""

import dataclasses

import pytest
import small
import torch

from mmoe.models.multimodal import MultimodalModel
from mmoe.recipe.model import SVA, ConvNet, Model, ViT
from mmoe.recipe.tokens import OURS


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    encoders = (
        ViT(name="vit", type="vit", image_size=16, patch_size=4, width=16, layers=1, heads=2),
        ConvNet(name="convnet", type="convnet", image_size=16, widths=(8, 8, 16)),
    )
    parts = Model(
        backbone=small.BACKBONE, moe=small.MIXTURE, encoders=encoders, connector=SVA(grid=2, width=16, heads=2)
    )
    recipe = dataclasses.replace(small.RECIPE, model=parts)
    return MultimodalModel(recipe, small.config()).eval()


def shown(pictures: torch.Tensor) -> dict:
    """A batch's fields of pictures [n, 3, 16, 16]."""
    return {"images": {16: pictures}, "original_sizes": torch.full((len(pictures), 2), 16)}


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(4, 64, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def test_branches_and_documents_are_alone(model: MultimodalModel) -> None:
    image = [OURS.image] * 4
    pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    prefix, one, two, other = [1, *image], ids(4, 1), ids(3, 2), [1, *image, *ids(5, 3)]
    tokens = [*prefix, *one, *two, *other, 0, 0]
    row = {
        "position": [*range(9), *range(5, 8), *range(10), 0, 0],
        "document": [1] * 12 + [2] * 10 + [0] * 2,
        "branch": [0] * 5 + [1] * 4 + [2] * 3 + [0] * 12,
    }
    packed = small.batch(
        torch.tensor([tokens]), **shown(pictures), **{name: torch.tensor([value]) for name, value in row.items()}
    )
    logits = model.logits(packed)[0]

    def alone(sequence: list[int], picture: int) -> torch.Tensor:
        return model.logits(small.batch(torch.tensor([sequence]), **shown(pictures[picture : picture + 1])))[0]

    torch.testing.assert_close(logits[:9], alone([*prefix, *one], 0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[9:12], alone([*prefix, *two], 0)[5:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[12:22], alone(other, 1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_losses_are_the_masked_places(model: MultimodalModel) -> None:
    tokens = torch.tensor([ids(8, 5), ids(8, 6)])
    mask = torch.zeros(2, 8)
    mask[0, 3] = mask[1, 0] = mask[1, 7] = 1
    batch = small.batch(tokens, loss_mask=mask, labels=tokens.flip(1))
    expected = torch.nn.functional.cross_entropy(
        model.logits(batch)[mask.bool()], tokens.flip(1)[mask.bool()], reduction="none"
    )
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)


def test_too_few_images_are_an_error(model: MultimodalModel) -> None:
    batch = small.batch(torch.tensor([[1, *[OURS.image] * 8]]), **shown(torch.zeros(1, 3, 16, 16)))
    with pytest.raises(ValueError, match="8 <image> tokens"):
        model.logits(batch)


def test_text_only_batches_train(model: MultimodalModel) -> None:
    losses = model(small.batch(torch.tensor([ids(8, 7)])))
    losses.sum().backward()
    assert model.language.embedding.word_embeddings.weight.grad is not None
