"""The cursor walk: pages in order until fal says that there is no next one, and only then."""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import msgspec

from faletl.errors import AstrayError, ContractError
from faletl.fal.bodies import one_body
from faletl.fal.client import FalClient
from faletl.wire import TEXT, UNREADABLE, MalformedBodyError, Params, as_json

log = logging.getLogger(__name__)

MAX_PAGES = 100_000
MAX_BYTES = 32 * 2**30
"""Of JSON in one walk: some hundred million charges."""

MAX_EMPTY_PAGES = 100
"""In a row: a walk that goes on beyond them would go on for ever."""

MAX_RECORDS = 100_000
"""Of one page, ten times what fal documents. Lists around records (buckets) count like these."""

MAX_FIELDS = 10_000
"""Of one JSON object, a hundred times what fal sends."""

MAX_CURSOR_BYTES = 16_384
"""Of a cursor as it was sent: a longer one fits no URL."""

_MAX_WORDS = 1_000_000
"""Numbers of a page that JSON does not have (NaN, Infinity)."""

_COUNTED_ABOVE = 400_000
"""Commas in a page above which its records are counted before any becomes a Python object: that number
of objects takes 28 MiB. A page of 10,000 charges has some 150,000 commas."""

_DEEPEST = 10_000
"""Levels of nesting that are counted in: a parser refuses far fewer."""

_NUL = re.compile(rb"(?<!\\)(?:\\\\)*+\\u0000")  # not an escaped backslash before u0000
_TEXT_OR_MARK = re.compile(TEXT + rb"|[\[\]{},]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Page:
    """One answer of a walk. `rows` counts its records, `number` counts from 1.

    `date` is fal's clock when it answered; None where it did not say so, and for pages landed before.
    """

    number: int
    body: bytes
    request_id: str | None
    rows: int
    next_cursor: str | None
    date: datetime | None = None


def read_envelope(body: bytes, rows_path: tuple[str, ...]) -> tuple[int, str | None]:
    """How many records the body holds, and the cursor of the next page (None at the end).

    Raises:
        MalformedBodyError: no whole JSON document.
        ContractError: another document: no record list, too many records, a cursor that cannot be
            one, or one that `has_more` contradicts.
    """
    if body.count(b",") > (_COUNTED_ABOVE if rows_path else MAX_FIELDS):
        require_uncrowded(body)
    try:
        envelope = _envelope(rows_path).decode(as_json(body))
    except msgspec.ValidationError as error:
        raise ContractError(f"fal's answer is not what was asked for: {error}") from None
    except UNREADABLE as error:
        raise MalformedBodyError(f"the answer is no whole JSON document ({error})") from None
    if b"\\" in body and b"\\u0000" in body and _NUL.search(body):
        raise ContractError("fal's answer holds a NUL character")
    if not rows_path:
        return 1, None
    cursor = _cursor(envelope)
    if cursor == "" and not envelope.has_more:
        cursor = None  # contract.py notes it as drift
    if envelope.has_more is None:
        log.warning("fal left has_more out; the cursor decides")
    elif envelope.has_more != (cursor is not None):
        said = "a next page but gave no cursor" if envelope.has_more else "no next page but a cursor"
        raise ContractError(f"fal announced {said}; the walk cannot be complete")
    return _count(envelope, rows_path), cursor


def walk(
    client: FalClient,
    path: str,
    params: Params,
    rows_path: tuple[str, ...],
    landed: Iterator[bytes],
    *,
    metrics: bool,
) -> Generator[tuple[Page, bool]]:
    """Yield every page and whether it is new: first the `landed` ones, then what fal has behind them.

    Only a missing cursor ends the walk: not a short page, not an empty one.

    Raises:
        AstrayError: a cursor came twice, or there are more pages, empty ones or bytes than can be meant.
    """
    asked: set[str] = set()
    cursor: str | None = None
    size = empty = 0
    for number in range(1, MAX_PAGES + 1):
        with one_body():
            page = _landed_page(number, landed, rows_path)
            is_new = page is None
            if page is None:
                landed = iter(())  # ask fal from here on
                more = params if cursor is None else {**params, "cursor": cursor}
                page = _asked_page(client, path, more, rows_path, number, metrics=metrics)
            yield page, is_new
            following, request_id = page.next_cursor, page.request_id
            size, empty = size + len(page.body), 0 if page.rows else empty + 1
            del page  # before the next one is asked for
        if following is None:
            return
        if why := _why_astray(empty, size, is_repeated=following in asked):
            raise AstrayError(why).at(page=number, request_id=request_id)
        asked.add(following)
        cursor = following
    raise AstrayError(f"fal announced more than {MAX_PAGES:,} pages").at(page=MAX_PAGES)


def _landed_page(number: int, landed: Iterator[bytes], rows_path: tuple[str, ...]) -> Page | None:
    """The next page that landed before; None where there is none, or it cannot be one."""
    body = next(landed, None)
    if body is None:
        return None
    try:
        rows, following = read_envelope(body, rows_path)
    except (MalformedBodyError, ContractError):
        return None
    return Page(number, body, None, rows, following)


def _asked_page(
    client: FalClient,
    path: str,
    params: Params,
    rows_path: tuple[str, ...],
    number: int,
    *,
    metrics: bool,
) -> Page:
    answer, (rows, following) = client.get(
        path, params, lambda body: read_envelope(body, rows_path), metrics=metrics
    )
    return Page(number, answer.body, answer.request_id, rows, following, answer.date)


def _why_astray(empty: int, size: int, *, is_repeated: bool) -> str:
    """Why a walk that fal announced a next page of cannot go on; nothing where it can."""
    if empty >= MAX_EMPTY_PAGES:
        return f"fal sent {MAX_EMPTY_PAGES} empty pages in a row and announced still more"
    if size > MAX_BYTES:
        return f"fal sent more than {MAX_BYTES:,} bytes and announced still more"
    return "fal gave the same cursor twice; the walk would never end" if is_repeated else ""


@cache
def _envelope(rows_path: tuple[str, ...]) -> msgspec.json.Decoder[Any]:
    """A decoder of everything around the records; the records themselves stay unparsed bytes."""
    if not rows_path:
        return msgspec.json.Decoder(dict[str, msgspec.Raw])
    inner: Any = msgspec.Raw
    for step in reversed(rows_path[1:]):
        inner = msgspec.defstruct("Level", [("rows", list[inner])], rename={"rows": step})
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = [
        ("rows", list[inner]),
        ("next_cursor", msgspec.Raw, msgspec.Raw(b"null")),
        ("has_more", bool | None, None),
    ]
    return msgspec.json.Decoder(msgspec.defstruct("Envelope", fields, rename={"rows": rows_path[0]}))


def _count(envelope: Any, rows_path: tuple[str, ...]) -> int:
    levels = [envelope]
    for _ in rows_path[1:]:
        levels = [inner for level in levels for inner in level.rows]
    count = sum(len(level.rows) for level in levels)
    if max(count, len(levels)) > MAX_RECORDS:
        raise ContractError(_CROWDED)
    return count


_CURSOR: msgspec.json.Decoder[str | None] = msgspec.json.Decoder(str | None)


def _cursor(envelope: Any) -> str | None:
    """The cursor; one that is too long is refused before it is decoded."""
    if len(memoryview(envelope.next_cursor)) > MAX_CURSOR_BYTES:
        raise ContractError(f"fal gave a cursor of more than {MAX_CURSOR_BYTES:,} bytes")
    try:
        return _CURSOR.decode(envelope.next_cursor)
    except msgspec.ValidationError as error:
        raise ContractError(f"fal's answer is not what was asked for: {error} at next_cursor") from None
    except UNREADABLE as error:
        raise MalformedBodyError(f"the answer is no whole JSON document ({error})") from None


def require_uncrowded(body: bytes) -> None:
    """Count the elements of lists, and the fields of each object, without a Python object for any.

    Raises:
        ContractError: there are more records, or more fields in one object, than can be meant.
    """
    fields, elements = list[int](), 0  # of each object that is open its fields; -1 for a list
    for found in _TEXT_OR_MARK.finditer(body):
        match body[found.start()]:
            case 0x2C if fields and fields[-1] < 0:  # a comma in a list
                elements += 1
                if elements >= MAX_RECORDS:
                    raise ContractError(_CROWDED)
            case 0x2C if fields:
                fields[-1] += 1
                if fields[-1] >= MAX_FIELDS:
                    raise ContractError(
                        f"fal's answer holds more than {MAX_FIELDS:,} fields in one object"
                    )
            case 0x5B | 0x7B as opened:  # [ or {
                fields.append(-1 if opened == 0x5B else 0)
                if len(fields) > _DEEPEST:
                    return
            case 0x5D | 0x7D if fields:  # ] or }
                fields.pop()


_CROWDED = f"fal's answer holds more than {MAX_RECORDS:,} records on one page"
