"""Packing: the bounds and completeness on random lengths, the plan, and the tensors."""

from collections import Counter

import numpy as np
import pytest
import torch

from mmoe import _host
from mmoe.data.document import Document
from mmoe.data.order import Order
from mmoe.data.pack import PACKS_IN_WINDOW, WINDOW, Lengths, Planner, assemble
from mmoe.errors import UserError


def fill(tokens, images, room_tokens: int, room_images: int, packs: int, best: bool) -> list[int]:
    scale = max(room_images, 1)

    def left(room: list[int]) -> int:
        return min(room[0] * scale, room[1] * room_tokens) if room_images else room[0]

    fits = [i for i in range(len(tokens)) if tokens[i] <= room_tokens and images[i] <= room_images]
    rooms, pack = [[room_tokens, room_images] for _ in range(packs)], [-1] * len(tokens)
    for i in sorted(fits, key=lambda i: -max(tokens[i] * scale, images[i] * room_tokens)):
        open_ = [p for p, room in enumerate(rooms) if room[0] >= tokens[i] and room[1] >= images[i]]
        if not open_:
            rooms.append([room_tokens, room_images])
            open_ = [len(rooms) - 1]
        chosen = (min if best else max)(open_, key=lambda p: left(rooms[p]))
        rooms[chosen][0] -= tokens[i]
        rooms[chosen][1] -= images[i]
        pack[i] = chosen
    return pack


def oracle(tokens: list[int], images: list[int], room_tokens: int, room_images: int) -> list[int]:
    fits = [i for i in range(len(tokens)) if tokens[i] <= room_tokens and images[i] <= room_images]
    by_tokens = -(-sum(tokens[i] for i in fits) // room_tokens)
    by_images = -(-sum(images[i] for i in fits) // room_images) if room_images else 0
    best = fill(tokens, images, room_tokens, room_images, 0, best=True)
    spread = fill(tokens, images, room_tokens, room_images, max(by_tokens, by_images), best=False)
    return spread if max(spread, default=-1) < max(best, default=-1) else best


@pytest.mark.parametrize("seed", range(40))
def test_packs_keep_both_bounds_and_lose_nothing(seed):
    random = np.random.default_rng(seed)
    room_tokens, room_images = int(random.integers(1, 200)), int(random.integers(0, 9))
    count = int(random.integers(0, 120))
    tokens = random.integers(1, random.integers(2, 250), count)
    images = random.integers(0, random.integers(1, 12), count)
    pack = _host.pack(tokens, images, room_tokens, room_images)
    fits = (tokens <= room_tokens) & (images <= room_images)
    assert ((pack >= 0) == fits).all()
    assert set(pack[fits].tolist()) == set(range(pack.max(initial=-1) + 1))
    for p in range(pack.max(initial=-1) + 1):
        assert tokens[pack == p].sum() <= room_tokens
        assert images[pack == p].sum() <= room_images
    assert pack.tolist() == oracle(tokens.tolist(), images.tolist(), room_tokens, room_images)


def test_large_items_are_packed_by_best_fit():
    assert _host.pack([5, 6, 4, 5], [0] * 4, 10, 1).tolist() == [1, 0, 0, 1]


def test_small_items_short_of_images_share_packs_with_large_ones():
    # 4 of 100 tokens and 1 image, 60 of 10 tokens and 1 image; best fit alone would need 9 packs.
    tokens, images = [100] * 4 + [10] * 60, [1] * 64
    assert _host.pack(tokens, images, 250, 16).max() + 1 == 4


def planner(seed: int = 0, **changes) -> Planner:
    random = np.random.default_rng(seed)
    lengths = [Lengths(tokens=random.integers(10, 120, size), images=random.integers(0, 4, size)) for size in (700, 90)]
    order = Order(["a", "b"], [700, 90], [3.0, 1.0], seed)
    return Planner(order, lengths, **({"sequence_length": 256, "images_per_pack": 12} | changes))


def test_a_window_holds_its_samples_once_within_the_bounds():
    plan = planner(sequence_length=110, images_per_pack=2)
    window = plan.window(3)
    source, sample = plan.order.at(3 * plan.samples, plan.samples)
    slots = [slot for pack in window.packs for slot in pack] + list(window.oversize)
    assert Counter(slots) == Counter(zip(source.tolist(), sample.tolist(), strict=True))
    for pack in window.packs:
        assert pack
        assert sum(plan.lengths[s].tokens[i] for s, i in pack) <= 110
        assert sum(plan.lengths[s].images[i] for s, i in pack) <= 2
    for s, i in window.oversize:
        assert plan.lengths[s].tokens[i] > 110 or plan.lengths[s].images[i] > 2


def test_a_window_is_a_pure_function_of_its_number():
    plan = planner()
    forward = [plan.window(i) for i in range(4)]
    assert [planner().window(i) for i in (3, 1)] == [forward[3], forward[1]]
    assert planner(seed=1).window(0) != forward[0]


def test_packs_come_in_random_order():
    # Filling largest first would put the long documents into the first packs.
    plan = planner()
    longest = [max(plan.lengths[s].tokens[i] for s, i in pack) for pack in plan.window(0).packs]
    assert longest != sorted(longest, reverse=True)


def test_windows_are_large_enough_for_long_packs():
    plan = planner(sequence_length=8192, images_per_pack=1000)
    assert plan.samples > WINDOW
    assert len(plan.window(0).packs) >= PACKS_IN_WINDOW


def test_packs_are_more_than_nine_tenths_full():
    plan = planner()
    packs = [pack for number in range(4) for pack in plan.window(number).packs]
    tokens = sum(plan.lengths[s].tokens[i] for pack in packs for s, i in pack)
    assert tokens / (len(packs) * 256) > 0.95


def test_a_source_that_never_fits_is_refused():
    with pytest.raises(UserError, match="no sample of a fits"):
        planner(sequence_length=9)


def document(key: str, length: int, base: int) -> Document:
    ramp = np.arange(base, base + length)
    return Document(
        key=key,
        tokens=ramp,
        labels=ramp + 1,
        loss_mask=np.ones(length, np.float32),
        position=np.arange(length),
        branch=np.full(length, base, np.int32),
        images=(),
    )


def test_assemble():
    batch = assemble([[document("a", 2, 5), document("b", 3, 7)], [document("c", 1, 9)]], 6)
    assert batch["tokens"].tolist() == [[5, 6, 7, 8, 9, 0], [9, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, 8, 9, 10, 0], [10, 0, 0, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert batch["position"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0]]
    assert batch["document"].tolist() == [[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]]
    assert batch["branch"].tolist() == [[5, 5, 7, 7, 7, 0], [9, 0, 0, 0, 0, 0]]
    assert batch["samples"] == [["a", "b"], ["c"]]
    types = {name: batch[name].dtype for name in batch if name != "samples"}
    assert types == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "position": torch.int64,
        "loss_mask": torch.float32,
        "document": torch.int32,
        "branch": torch.int32,
    }


def test_assemble_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="7 tokens in a pack of 6"):
        assemble([[document("a", 4, 0), document("b", 3, 0)]], 6)
