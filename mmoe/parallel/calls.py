"""Which collectives this process has entered and which it waits for now; the watchdog and the benchmarks read it.

:func:`install` puts a wrapper around each function of ``torch.distributed`` that starts one, before Megatron-Core is
imported, which binds some of them then. Object collectives, ``send``, ``recv`` and ``batch_isend_irecv`` go through
these. The wrapper adds 6 µs to a call under few frames of Python and 11 µs under thirty, on one core of a Xeon with
AVX-512; 3 µs more where it is asynchronous and waited for later.

Not seen: a receive from any rank; creation of groups; what a library starts on a process group's own methods. A wait is
the time that a thread is blocked in the call or in ``Work.wait``. On CUDA both return at once, so that only the
sequence of calls is seen here.
"""

import functools
import inspect
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# Each with the parameter whose shape tells most. The "single" ones also serve all_gather_into_tensor and
# reduce_scatter_tensor, their names of before.
_COLLECTIVES = {
    "all_reduce": "tensor",
    "reduce": "tensor",
    "broadcast": "tensor",
    "all_gather": "tensor",
    "all_gather_single": "input_tensor",
    "reduce_scatter": "output",
    "reduce_scatter_single": "input",
    "all_to_all": "",
    "all_to_all_single": "input",
    "gather": "tensor",
    "scatter": "tensor",
    "barrier": "",
}
_EXCHANGES = {"isend": "dst", "irecv": "src"}

Site = tuple[str, int, str]
"""File, line, function."""


class Group(NamedTuple):
    """Ranks that must enter the same calls in the same order. ``key`` is the same on all of them and no other's."""

    key: str
    title: str
    ranks: tuple[int, ...]


class Call(NamedTuple):
    """The ``sequence``-th call of a group, from 1."""

    group: Group
    sequence: int
    name: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    sites: tuple[Site, ...]
    """The innermost line outside of torch, then the nearest one of mmoe that is not in mmoe/parallel."""


entered: dict[str, Call] = {}
"""The last call of each group, by its key."""
waiting: dict[int, tuple[Call, float]] = {}
"""By thread: the call that it waits for, and since when (``time.perf_counter``)."""
broken: list[Call] = []
"""Calls that ended in an error: a connection is gone, or an argument was wrong."""
_groups: dict[str, Group] = {}
_asynchronous: WeakKeyDictionary[Any, Call] = WeakKeyDictionary()
_seconds: defaultdict[str, float] = defaultdict(float)
_phases: list[tuple[str, float]] = []
_ended: list[tuple[str, float, float]] = []


def seconds_waited() -> dict[str, float]:
    """Seconds that this process's threads have spent in collectives since the start, by the function's name."""
    return dict(_seconds)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Says that this rank is in work that may take long while others wait for it, such as writing a checkpoint."""
    _phases.append((name, time.perf_counter()))
    try:
        yield
    finally:
        _ended[:] = [(*_phases.pop(), time.perf_counter())]


def current_phase(after: float) -> tuple[str, float] | None:
    """The outermost phase and since when, or the last one if it ended later than ``after`` (``time.perf_counter``)."""
    if _phases:
        return _phases[0]
    return next(((name, since) for name, since, end in _ended if end > after), None)


def reset() -> None:
    """Forgets all calls: groups that are made anew use the old names."""
    for record in (entered, waiting, broken, _groups, _asynchronous):
        record.clear()


_installed = False


def install() -> None:
    """Wraps the collectives of ``torch.distributed``. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    for name, tensor in _COLLECTIVES.items():
        _replace(name, _collective(getattr(distributed_c10d, name), tensor))
    for name, peer in _EXCHANGES.items():
        _replace(name, _exchange(getattr(distributed_c10d, name), peer))
    wait = dist.Work.wait

    @functools.wraps(wait)
    def watched(work: Any, *args: Any, **kwargs: Any) -> Any:
        call = _asynchronous.pop(work, None)
        return wait(work, *args, **kwargs) if call is None else _timed(call, wait, work, *args, **kwargs)

    setattr(dist.Work, "wait", watched)


def _replace(name: str, function: Callable[..., Any]) -> None:
    # P2POp and the object collectives look the names up in the module that defines them.
    for module in (dist, distributed_c10d):
        setattr(module, name, function)


def _timed(call: Call, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    thread, start = threading.get_ident(), time.perf_counter()
    waiting[thread] = call, start
    try:
        return function(*args, **kwargs)
    except RuntimeError:
        broken.append(call)
        raise
    finally:
        waiting.pop(thread, None)
        _seconds[call.name] += time.perf_counter() - start


def _entered(
    group: Group, name: str, tensor: Any, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    before = entered.get(group.key)
    known = isinstance(tensor, torch.Tensor)
    call = entered[group.key] = Call(
        group,
        before.sequence + 1 if before else 1,
        name,
        tuple(tensor.shape) if known else None,
        tensor.dtype if known else None,
        _sites(sys._getframe(2)),
    )
    result = _timed(call, function, *args, **kwargs)
    if isinstance(result, dist.Work):
        _asynchronous[result] = call
    return result


def _argument(function: Callable[..., Any], name: str) -> Callable[[Any, dict[str, Any]], Any]:
    """Finds the parameter ``name`` among a call's arguments; None where it is left out."""
    place = list(inspect.signature(function).parameters).index(name)
    return lambda args, kwargs: args[place] if len(args) > place else kwargs.get(name)


def _collective(function: Callable[..., Any], tensor: str) -> Callable[..., Any]:
    group_of = _argument(function, "group")
    tensor_of = _argument(function, tensor) if tensor else lambda args, kwargs: None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        group = _group(group_of(args, kwargs))
        if group is None:
            return function(*args, **kwargs)
        return _entered(group, function.__name__, tensor_of(args, kwargs), function, args, kwargs)

    return call


def _exchange(function: Callable[..., Any], peer: str) -> Callable[..., Any]:
    """A send and its receive are the same call of a group of their own, made of the two ranks in that order."""
    group_of, global_peer = _argument(function, "group"), _argument(function, peer)
    group_peer, tensor_of = _argument(function, f"group_{peer}"), _argument(function, "tensor")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        group, other = _group(group_of(args, kwargs)), global_peer(args, kwargs)
        if other is None and group is not None and (place := group_peer(args, kwargs)) is not None:
            other = group.ranks[place]
        if group is None or other is None:
            return function(*args, **kwargs)
        here = dist.get_rank()
        pair = (here, other) if peer == "dst" else (other, here)
        key = f"{group.key} {pair[0]}>{pair[1]}"
        both = _groups.get(key) or _groups.setdefault(key, Group(key, f"{group.title} {pair[0]} → {pair[1]}", pair))
        return _entered(both, "send/receive", tensor_of(args, kwargs), function, args, kwargs)

    return call


def _group(group: Any) -> Group | None:
    """None for a group that this process is not in."""
    group = group or dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        return None
    key = group.group_name
    known = _groups.get(key)
    if known is None:
        known = _groups[key] = Group(key, group.group_desc, tuple(dist.get_process_group_ranks(group)))
    return known


_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_PARALLEL = str(Path(__file__).parent) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS, _OTHER, _HIDDEN = range(3)
_kinds: dict[str, int] = {}


def _kind(file: str) -> int:
    if file.startswith((_TORCH, _PARALLEL + "calls.py")):
        kind = _HIDDEN
    else:
        kind = _OURS if file.startswith(_PACKAGE) and not file.startswith(_PARALLEL) else _OTHER
    return _kinds.setdefault(file, kind)


def _sites(frame: FrameType | None) -> tuple[Site, ...]:
    inner: tuple[Site, ...] = ()
    while frame is not None:
        code = frame.f_code
        kind = _kinds.get(code.co_filename)
        if kind is None:
            kind = _kind(code.co_filename)
        if kind == _OURS:
            return *inner, (code.co_filename, frame.f_lineno, code.co_name)
        if kind == _OTHER and not inner:
            inner = ((code.co_filename, frame.f_lineno, code.co_name),)
        frame = frame.f_back
    return inner


def position(frame: FrameType) -> tuple[Site, ...]:
    """Where a thread is: the innermost line, in torch too, then the nearest one of mmoe above mmoe/parallel."""
    here: Site = (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
    return here, *(site for site in _sites(frame)[-1:] if site != here and _kinds[site[0]] == _OURS)


def raised_in(error: BaseException) -> tuple[Site, ...]:
    """The innermost line of mmoe that ``error`` came through, one outside of mmoe/parallel where there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [(f.filename, f.lineno or 0, f.name) for f in frames if f.filename.startswith(_PACKAGE)]
    outer = [site for site in ours if not site[0].startswith(_PARALLEL)]
    return tuple((outer or ours)[-1:])


def show(sites: tuple[Site, ...]) -> str:
    """``package/file.py:12 function``, the caller in brackets behind it."""
    texts = [f"{_short(file)}:{line} {function}" for file, line, function in sites]
    return texts[0] + (f" (from {texts[1]})" if texts[1:] else "") if texts else "an unknown line"


def _short(file: str) -> str:
    """A path from its package on."""
    for root in (str(Path(_PACKAGE).parent), *sorted(sys.path, key=len, reverse=True)):
        if root and file.startswith(root.rstrip(os.sep) + os.sep):
            return file[len(root.rstrip(os.sep)) + 1 :]
    return file
