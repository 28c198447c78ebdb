"""Large bodies take turns: one budget of memory for all threads of a process.

A decoded body is kept as bytes, searched, cut into records and written: two or three copies of it exist
at once. For usual pages that is little; for several of the largest that FALETL_MAX_BODY allows it would
be hundreds of megabytes. So a thread with a body above `LARGE_BODY` takes the only turn of the process
until it has landed, or staged, that body. The memory that it then frees goes back to the system and does
not stay in the heap of that thread.
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
"""Bytes. By default, glibc soon takes blocks of up to 32 MiB from a thread's heap, and keeps them."""

_turn = threading.Lock()


class _State(threading.local):
    """The state of a thread: the number of its `one_body` spans, and whether it has the turn."""

    spans = 0
    has_turn = False


_state = _State()


@contextmanager
def one_body() -> Iterator[None]:
    """A span in which the thread has one body; a turn that it took ends with the outermost span."""
    _state.spans += 1
    try:
        yield
    except BaseException as error:
        forget_frames(error)
        raise
    finally:
        _state.spans -= 1
        if not _state.spans:
            _end_turn()


@contextmanager
def passed_on() -> Iterator[None]:
    """A span whose body goes to the span around it; if it fails, the body is released at once."""
    had_turn = _state.has_turn
    try:
        yield
    except BaseException as error:
        forget_frames(error)
        if not had_turn:
            _end_turn()
        raise


def take_turn(size: int) -> float:
    """Wait for the turn if a body of this many bytes needs it; return the seconds waited.

    Outside of `one_body` a thread has a body only for a moment, and needs no turn.
    """
    if size <= LARGE_BODY or _state.has_turn or not _state.spans:
        return 0
    began = time.monotonic()
    _map_large_blocks()
    _turn.acquire()
    _state.has_turn = True
    return time.monotonic() - began


@cache
def _map_large_blocks() -> None:
    """Make glibc return large blocks to the system when they are freed, as other libraries do."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)


def _end_turn() -> None:
    if _state.has_turn:
        _state.has_turn = False
        _turn.release()


def chain(error: BaseException) -> list[BaseException]:
    """Return the error and the errors that caused it."""
    errors: list[BaseException] = []
    below: BaseException | None = error
    while below is not None and below not in errors:
        errors.append(below)
        below = below.__cause__ or below.__context__
    return errors


def forget_frames(error: BaseException) -> None:
    """Clear the frames of an error, whose variables may be bodies, or a request with the key."""
    for cause in chain(error):
        traceback.clear_frames(cause.__traceback__)
