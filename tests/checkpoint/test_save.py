"""A checkpoint written beside the training holds the state of the step that it is of."""

import threading
from pathlib import Path
from typing import Any

import pytest
import small
import torch

from mmoe.checkpoint import layout, load
from mmoe.checkpoint.save import Saver
from mmoe.errors import UserError
from mmoe.models.multimodal import build
from mmoe.parallel import state
from mmoe.train.step import Stepper

# isort: split
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

pytestmark = pytest.mark.latest


@pytest.fixture
def stepper() -> Stepper:
    small.config()
    made = Stepper(small.RECIPE, [build(small.RECIPE)])
    step(made)
    return made


def step(stepper: Stepper) -> None:
    batch = {**small.batch(torch.full((2, 32), 5)), "samples": [["a"], ["b"]], "skipped": []}
    assert stepper.step(iter([batch]), 0.1).taken


def weights(stepper: Stepper) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in load.weights(stepper.models[0]).items()}


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    (tmp_path / "tokenizer.json").write_text("{}")
    return Saver(tmp_path, small.RECIPE, tmp_path / "tokenizer.json")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    gate, write = threading.Event(), state.Write.run

    def run(self: state.Write) -> None:
        assert gate.wait(60)
        write(self)

    monkeypatch.setattr(state.Write, "run", run)
    return gate


def test_training_goes_on_before_anything_is_written(
    stepper: Stepper, saver: Saver, gate: threading.Event, tmp_path: Path
) -> None:
    before, noise = weights(stepper), torch.get_rng_state()
    assert saver.start(1, stepper.wrapped, stepper.optimizer, {"step": 1}) == []
    assert saver.poll() == []
    step(stepper)
    torch.rand(3)
    after = weights(stepper)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert layout.newest(tmp_path) is None
    gate.set()
    (saved,) = saver.finish()
    assert saver.finish() == []
    assert (saved.path, saved.step) == (layout.newest(tmp_path), 1)
    assert 0 < saved.stall <= saved.seconds
    layout.verify(saved.path)
    assert load.resume(saved.path, stepper.wrapped, stepper.optimizer) == {"step": 1}
    assert torch.equal(torch.get_rng_state(), noise)
    again = weights(stepper)
    assert all(torch.equal(before[name], again[name]) for name in before)
    # The optimizer's state too: from here the step is the same one.
    step(stepper)
    once_more = weights(stepper)
    assert all(torch.equal(after[name], once_more[name]) for name in after)


def test_what_a_factory_shows_of_a_live_tensor_is_copied_too(stepper: Stepper, tmp_path: Path) -> None:
    live = torch.arange(6.0)

    def build(key: str, data: torch.Tensor, replica: Any, flat: Any) -> Any:
        return ShardedTensor.from_rank_offsets(key, data.view(2, 3), replica_id=replica)

    factory = ShardedTensorFactory("seen", live, build, lambda built: built)
    write = state.Write(tmp_path, {"seen": factory})
    ((_, _, (_, ((_, copy),))),) = [bucket for bucket in write.buckets if bucket[2][1]]
    live.zero_()
    assert torch.equal(copy, torch.arange(6.0).view(2, 3))
    write.run()
    write.finish()


def test_poll_ends_one_that_is_written(stepper: Stepper, saver: Saver) -> None:
    saver.start(1, stepper.wrapped, stepper.optimizer, {})
    assert saver.pending is not None
    saver.pending.thread.join()
    assert [saved.step for saved in saver.poll()] == [1]


def test_the_next_one_waits_for_the_one_before(
    stepper: Stepper, saver: Saver, gate: threading.Event, tmp_path: Path
) -> None:
    saver.start(1, stepper.wrapped, stepper.optimizer, {})
    gate.set()
    assert [saved.step for saved in saver.start(2, stepper.wrapped, stepper.optimizer, {})] == [1]
    assert [saved.step for saved in saver.finish()] == [2]
    assert layout.newest(tmp_path) == layout.folder(tmp_path, 2)


def test_a_write_that_fails_is_told_once_it_is_waited_for(
    stepper: Stepper, saver: Saver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saver.start(1, stepper.wrapped, stepper.optimizer, {})
    saver.finish()

    def run(write: Any) -> None:
        write.request.async_fn_args[2].put(OSError(28, "No space left on device"))

    monkeypatch.setattr(state.Write, "run", run)
    saver.start(2, stepper.wrapped, stepper.optimizer, {})
    with pytest.raises(UserError, match=r"step 2 was not written: .*No space left.*step_00000001 is whole"):
        saver.finish()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]
