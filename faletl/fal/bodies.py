"""Large bodies take turns: one budget of memory for all threads of a process.

A body that is decoded is held as bytes, searched, cut into records and written: two or three copies of
it at once. For usual pages that is nothing; for several of the largest that FALETL_MAX_BODY allows it
would be hundreds of megabytes. So a thread that holds a body above `LARGE_BODY` has the process's only
turn until it has landed, or staged, what is in it. What it then frees goes back to the system, and does
not stay behind in the heap of that thread.
"""

from __future__ import annotations

import ctypes
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

LARGE_BODY = 8 * 2**20
"""Bytes, decoded. A page of 10,000 charges, the most that fal documents, has some 4 MiB."""

_M_MMAP_THRESHOLD = -3
_MAPPED_FROM = 2**20
"""Bytes. By itself, glibc soon takes blocks of up to 32 MiB from a thread's heap, and keeps them."""

_turn = threading.Lock()


class _Mine(threading.local):
    """What this thread is in: the number of `one_body` spans, and whether it has the turn."""

    spans = 0
    has_turn = False


_mine = _Mine()


@contextmanager
def one_body() -> Iterator[None]:
    """A span in which the thread holds one body; the turn that it took ends with the outermost span."""
    _mine.spans += 1
    try:
        yield
    except BaseException as error:
        forget_frames(error)
        raise
    finally:
        _mine.spans -= 1
        if not _mine.spans:
            _end_turn()


@contextmanager
def passed_on() -> Iterator[None]:
    """A span whose body goes to the span around it; if it fails, nobody holds the body any longer."""
    had_turn = _mine.has_turn
    try:
        yield
    except BaseException as error:
        forget_frames(error)
        if not had_turn:
            _end_turn()
        raise


def take_turn(size: int) -> float:
    """Wait for the turn if a body of that many bytes needs it; returns the seconds waited.

    Outside of `one_body` a thread holds a body only for a moment, and needs no turn.
    """
    if size <= LARGE_BODY or _mine.has_turn or not _mine.spans:
        return 0
    began = time.monotonic()
    _turn.acquire()
    _map_large_blocks()
    _mine.has_turn = True
    return time.monotonic() - began


@cache
def _map_large_blocks() -> None:
    """Have glibc give large blocks back when they are freed; other systems' libraries do it already."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)


def _end_turn() -> None:
    if _mine.has_turn:
        _mine.has_turn = False
        _turn.release()


def chain(error: BaseException) -> list[BaseException]:
    """The error and those that it came from."""
    found: list[BaseException] = []
    below: BaseException | None = error
    while below is not None and below not in found:
        found.append(below)
        below = below.__cause__ or below.__context__
    return found


def forget_frames(error: BaseException) -> None:
    """Drop what the frames of an error hold, which may be bodies, or a request with the key."""
    for one in chain(error):
        traceback.clear_frames(one.__traceback__)
