"""Training on pictures that a border makes square, read by the loader, with SVA's keys in the border masked.

What the released arithmetic leaves out is keys alone. What stands in the border of an encoder's image is of no
consequence if three things hold, as they do for ``local`` here: each of its cells sees its own pixels alone (a ViT's
attention and a convolution's neighbours carry the border into the picture's cells), it is not the first encoder (the
context is the mean of all of that one's cells), and every query has a key in the picture (one without any sees all of
its window).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sets
import torch
import training
from pictures import encode, save, smooth
from PIL import Image
from torch import Tensor

from mmoe.data.batch import Batch
from mmoe.data.loader import Loader
from mmoe.data.shards import Sample
from mmoe.models.multimodal import build_stages
from mmoe.parallel import engine
from mmoe.recipe.load import load_recipe
from mmoe.recipe.model import ConvNeXt
from mmoe.recipe.schema import Recipe
from mmoe.train.step import Stepper

STEPS = 3
FIRST, LOCAL = 16, 32
"""Sides of the images that the two encoders read; the maps have 4 × 4 cells, 2 × 2 of them in a query's window."""
ENCODERS = (
    'model.encoders=[{name="vit", type="vit", image_size=16, patch_size=4, width=16, layers=1, heads=2},'
    ' {name="local", type="convnext", image_size=32, patch_size=8, widths=[16], depths=[1]}]'
)
SHAPES = ((16, 32), (32, 16), (32, 32))
"""Height and width: the picture is all cells, or the two rows or columns in the middle; each window has one."""
THIN = (4, 32)
"""Half a row of cells, of which the released code keeps none."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The model is too small for several, which wait for each other where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(root: Path, shapes: Sequence[tuple[int, int]]) -> Path:
    """Samples of two pictures, the second one lying on its side in the file, which its EXIF turns upright."""
    samples, turned = [], Image.Exif()
    turned[0x0112] = 6
    for i in range(24):
        one, other = (smooth(2 * i + j, *shapes[(i + j) % len(shapes)]) for j in range(2))
        lying = save(Image.fromarray(np.rot90(other)), "JPEG", quality=90, exif=turned)
        samples.append(Sample(f"s{i:02d}", sets.record(2), [("png", encode(one)), ("jpg", lying)]))
    sets.write_set(root, "pictures", samples)
    training.write_recipe(root, sets.write_mixture(root, pictures=1.0))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("padded"), SHAPES)


def recipe(root: Path, *, masked: bool = True) -> Recipe:
    settings = [ENCODERS, f"model.connector.mask_padding={str(masked).lower()}", 'data.fit="pad"']
    made = load_recipe(str(root / "tiny.toml"), [*settings, "data.decoder=pillow"])
    vit, local = made.model.encoders
    assert isinstance(local, ConvNeXt)
    # A block's 7 x 7 convolution sees across cells; no recipe may have a stage without one.
    encoders = vit, replace(local, depths=(0,))
    return replace(made, model=replace(made.model, encoders=encoders))


def read(wanted: Recipe) -> list[Batch]:
    """The micro-batches of all steps."""
    micro, whole, model = wanted.train.micro_batch, wanted.train.global_batch, wanted.model
    sizes = {"image_tokens": model.image_tokens, "image_sizes": model.image_sizes}
    with Loader(wanted.data, **sizes, micro_batch=micro, global_batch=whole, seed=0) as loader:
        return [next(loader) for _ in range(STEPS * whole // micro)]


Change = Callable[[Batch], Batch]


def train(wanted: Recipe, change: Change = lambda batch: batch, steps: int = 1) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, from the same first weights."""
    engine.start(wanted.parallel, wanted.train.seed, alone=True)
    stepper = Stepper(wanted, build_stages(wanted))
    batches = map(change, read(wanted))
    outcomes = [stepper.step(batches, 1e-2) for _ in range(steps)]
    assert all(outcome.taken for outcome in outcomes)
    return [(outcome.loss, outcome.grad_norm) for outcome in outcomes]


def borders(batch: Batch, side: int) -> Tensor:
    """bool [n, 3, side, side]: the outer quarters above and below, or on either side."""
    outer = (torch.arange(side) < side // 4) | (torch.arange(side) >= side - side // 4)
    height, width = batch["original_sizes"][:, :, None, None].unbind(1)
    rows, columns = outer[:, None] & (height < width), outer[None] & (width < height)
    return (rows | columns)[:, None].expand(-1, 3, -1, -1)


def noise(side: int, *, border: bool) -> Change:
    """Other pixels in the borders of the images of this side, or everywhere else."""

    def change(batch: Batch) -> Batch:
        pixels = batch["images"][side]
        other = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
        pixels = torch.where(borders(batch, side) == border, other, pixels)
        return batch | {"images": batch["images"] | {side: pixels}}

    return change


def square(batch: Batch) -> Batch:
    return batch | {"original_sizes": torch.ones_like(batch["original_sizes"])}


@pytest.fixture(scope="module")
def plain(root: Path) -> list[tuple[float, float]]:
    return train(recipe(root), steps=STEPS)


def test_the_loader_gives_upright_sizes_and_gray_borders_where_keys_are_masked(root: Path) -> None:
    seen = set()
    for batch in read(recipe(root)):
        seen |= {tuple(size) for size in batch["original_sizes"].tolist()}
        for side in (FIRST, LOCAL):
            outside = borders(batch, side)
            if side == LOCAL:  # nothing is resized, which blends
                assert not batch["images"][side][outside].any()
            assert (batch["images"][side][~outside] != 0).double().mean() > 0.9
    assert seen == set(SHAPES)


def test_what_stands_in_the_border_of_masked_keys_trains_nothing(root: Path, plain: list[tuple[float, float]]) -> None:
    assert train(recipe(root), noise(LOCAL, border=True), STEPS) == plain
    assert len(set(plain)) == STEPS, "no step changes anything"
    assert differ(train(recipe(root), noise(LOCAL, border=False)), plain), "its images are not read at all"


def test_without_masks_it_trains(root: Path, plain: list[tuple[float, float]]) -> None:
    seen = train(recipe(root, masked=False))
    assert differ(seen, plain)
    assert differ(train(recipe(root, masked=False), noise(LOCAL, border=True)), seen)


def test_the_masks_are_those_of_the_pictures_sizes(root: Path, plain: list[tuple[float, float]]) -> None:
    """Square pictures have no border: all keys are seen, as without masks."""
    unmasked = train(recipe(root), square)
    assert differ(unmasked, plain)
    np.testing.assert_allclose(unmasked, train(recipe(root, masked=False)), rtol=1e-6)


def test_the_first_encoders_border_counts_in_the_context(root: Path, plain: list[tuple[float, float]]) -> None:
    assert differ(train(recipe(root), noise(FIRST, border=True)), plain)


def test_a_picture_too_thin_for_a_key_is_seen_with_its_border(tmp_path: Path) -> None:
    wanted = recipe(write(tmp_path, [THIN]))
    assert differ(train(wanted, noise(LOCAL, border=True)), train(wanted))


def differ(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> bool:
    """In the first step, before anything is learned, by more than rounding."""
    return abs(one[0][0] - other[0][0]) > 1e-5 * other[0][0]
