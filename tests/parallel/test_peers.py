"""Who is gone, and who says so: eight ranks of two hosts, all in this process."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import TCPStore

from mmoe.errors import RankLost
from mmoe.parallel import peers
from mmoe.parallel.peers import Peers

WORLD, A_HOST = 8, 4
Job = list[Peers]


class Store:
    """A store that may end; all of its views end with it."""

    def __init__(self, store: Any, ended: threading.Event) -> None:
        self.store, self.ended = store, ended

    def clone(self) -> "Store":
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if self.ended.is_set():
            raise RuntimeError("the store has ended")
        return getattr(self.store, name)


@pytest.fixture
def ended() -> threading.Event:
    """Set, the store has ended."""
    return threading.Event()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, ended: threading.Event) -> Iterator[Job]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(peers, "PrefixStore", lambda prefix, shared: shared)
    monkeypatch.setattr(peers, "SEARCH_SECONDS", 3.0)
    with ThreadPoolExecutor(WORLD) as pool:
        ranks = list(pool.map(lambda rank: Peers(Store(store.clone(), ended), rank, WORLD, 20), range(WORLD)))
    for rank in ranks:
        rank.addresses = [(*address[:2], f"host{other // A_HOST}") for other, address in enumerate(rank.addresses)]
    yield ranks
    for rank in ranks:
        rank.close()


def kill(job: Job, *ranks: int) -> None:
    for rank in ranks:
        job[rank].close()


def search(job: Job, *ranks: int) -> dict[int, Any]:
    with ThreadPoolExecutor(WORLD) as pool:
        return dict(zip(ranks, pool.map(lambda rank: job[rank].search(f"rank {rank} noticed"), ranks), strict=True))


def test_nobody_is_gone(job: Job) -> None:
    assert job[2].gone(range(WORLD)) == []
    assert job[2].lost(range(WORLD), "") is None
    assert search(job, 1, 5) == {1: None, 5: None}


def test_a_lost_rank_is_told_once_and_alike(job: Job) -> None:
    kill(job, 6)
    ends = search(job, *(rank for rank in range(WORLD) if rank != 6))
    assert {(end.text, end.status) for end in ends.values()} == {(ends[0].text, 69)}
    assert ends[0].text.startswith("rank 6 on host1 is lost: ")
    assert sum(end.tell for end in ends.values()) == 1


def test_a_rank_with_an_error_of_its_own_is_followed_in_silence_by_its_status(job: Job) -> None:
    job[6].leave_word("UserError: no data", 2)
    kill(job, 6)
    for end in search(job, 0, 3, 7).values():
        assert (end.text, end.status, end.tell) == ("ended after rank 6: UserError: no data", 2, False)


def test_a_rank_that_leaves_in_order_is_not_lost(job: Job) -> None:
    job[6].leave_word("")
    kill(job, 6)
    assert job[0].lost([6], "") is None


def test_ranks_that_end_after_another_are_not_named(job: Job) -> None:
    kill(job, 2)
    first = search(job, 0)[0]
    job[0].leave_word("")
    kill(job, 0)
    assert search(job, 5)[5].text == first.text
    assert "rank 2 on host0" in first.text


@pytest.mark.parametrize("agent", [False, True])
def test_a_host_that_took_the_store_along_is_told_by_the_lowest_that_is_left(
    job: Job, ended: threading.Event, agent: bool
) -> None:
    for rank in job:
        rank.store_in_first = not agent
    kill(job, *range(A_HOST))
    ended.set()
    ends = search(job, 4, 5, 6, 7)
    assert [rank for rank, end in ends.items() if end.tell] == [4]
    named = "ranks 0, 1, 2, 3 on host0 are lost" if agent else "rank 0 on host0 is lost"
    assert all(end.text.startswith(named) for end in ends.values())


def test_a_store_that_does_not_answer_is_nobodys_end(job: Job, ended: threading.Event) -> None:
    """As where its host is only stopped."""
    ended.set()
    assert search(job, 0, 3) == {0: None, 3: None}


def test_higher_ranks_look_after_one_each(job: Job, ended: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ABREAST", 2)
    kill(job, 1)
    assert job[4].without_store("") is None
    end = job[5].without_store("")
    assert end is not None
    assert (end.text.startswith("rank 1 on host0"), end.tell) == (True, False)


def test_connections_are_taken_however_many_come(job: Job) -> None:
    """A queue that nobody empties would be full after 4096."""
    host, port, _ = job[3].addresses[3]
    for _ in range(5000):
        socket.create_connection((host, port), 3).close()
    assert job[0].gone([3]) == []


def test_a_process_without_a_file_left_does_not_take_the_others_for_gone(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(peers.socket, "create_connection", refuse)
    assert job[0].gone(range(WORLD)) == []


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(peers, "PrefixStore", lambda prefix, shared: shared)
    with pytest.raises(RankLost, match="ranks 1, 2 did not come within 1 s"):
        Peers(Store(store, threading.Event()), 0, 3, 1)
